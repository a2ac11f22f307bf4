"""Tiny ImageNet and Imagenette in small folders of the published layout."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_runner.data import published
from ssl_runner.data.dataset import Source
from ssl_runner.errors import UsageError

Reader = Callable[..., Source]


def picture(path: Path, value: int, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny ImageNet with two classes: 3 training and 2 validation images each, and a test image."""
    base = tmp_path / "tiny-imagenet-200"
    ids = ("n02", "n01")
    for label, one in enumerate(ids):
        for i in range(3):
            picture(base / "train" / one / "images" / f"{one}_{i}.JPEG", 100 * label + i)
        (base / "train" / one / f"{one}_boxes.txt").write_text("x\t0\t0\t62\t62\n")
    lines = []
    for i, one in enumerate(("n01", "n02", "n02", "n01")):
        picture(base / "val" / "images" / f"val_{i}.JPEG", 200 + i)
        lines.append(f"val_{i}.JPEG\t{one}\t0\t0\t62\t62\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    picture(base / "test" / "images" / "test_0.JPEG", 0)
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "words.txt").write_text("n00\tentity\nn01\tcrane, machine\nn02\tgoldfish, Carassius auratus\n")
    return base


@pytest.fixture
def nette(tmp_path: Path) -> Path:
    """Imagenette with 2 training images and a validation image in each of its ten classes."""
    base = tmp_path / "imagenette2-320"
    for label, one in enumerate(published.IMAGENETTE_CLASSES):
        for i in range(2):
            picture(base / "train" / one / f"{one}_{i}.JPEG", 10 * label + i, (30, 20))
        picture(base / "val" / one / f"{one}_9.JPEG", 10 * label + 5, (20, 24))
    return base


def read(reader: Reader, root: Path, size: int | None = 64, channels: int | None = None) -> Source:
    return reader(str(root), size, channels, str(root.parent / "cache"))


@pytest.mark.parametrize("around", [False, True])
def test_tiny_imagenet_has_published_images_and_labels(tiny: Path, around: bool) -> None:
    data = read(published.tiny_imagenet, tiny.parent if around else tiny)
    assert data.images.shape == (10, 3, 64, 64)
    assert data.classes == ["crane", "goldfish"]  # sorted by WordNet ID
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 1, 0]
    assert (data.train.tolist(), data.test.tolist()) == ([*range(6)], [*range(6, 10)])
    assert data.images[:, 0, 32, 32].tolist() == [100, 101, 102, 0, 1, 2, 200, 201, 202, 203]
    assert str(data.skipped) == "skipped 1 file: 1 unlabelled test images"
    assert data.layout == "tiny-imagenet-200"


def test_imagenette_has_published_images_and_labels(nette: Path) -> None:
    data = read(published.imagenette, nette.parent, size=16)
    assert data.images.shape == (30, 3, 16, 16)
    assert data.classes[:2] == ["tench", "English springer"]
    assert data.labels.tolist() == [*np.repeat(np.arange(10), 2), *range(10)]
    assert (len(data.train), len(data.test), len(data.unlabeled)) == (20, 10, 0)
    expected = [10 * label + i for label in range(10) for i in range(2)]
    assert data.images[:20, 0, 8, 8].tolist() == expected
    assert data.images[20:, 0, 8, 8].tolist() == [10 * label + 5 for label in range(10)]


def test_published_sets_take_size_and_channels(tiny: Path, nette: Path) -> None:
    assert read(published.tiny_imagenet, tiny, 32, 1).images.shape == (10, 1, 32, 32)
    assert read(published.tiny_imagenet, tiny, None, 3).images.shape == (10, 3, 64, 64)
    grey, colour = read(published.imagenette, nette, 8, 1).images, read(published.imagenette, nette, 8).images
    assert torch.equal(grey, colour[:, :1])
    with pytest.raises(UsageError, match=r"expected a square image, found 30 x 20 pixels; set dataset.size"):
        read(published.imagenette, nette, None)


@pytest.mark.parametrize("reader", [published.tiny_imagenet, published.imagenette])
@pytest.mark.parametrize("root", [None, "missing"])
def test_missing_folder_is_refused_with_its_url(reader: Reader, root: str | None, tmp_path: Path) -> None:
    url = {published.tiny_imagenet: published.TINY_IMAGENET, published.imagenette: published.IMAGENETTE}[
        reader
    ]
    with pytest.raises(UsageError, match=r"^dataset.root=.*: expected the folder that contains") as error:
        reader(root and str(tmp_path / root), 64, None, str(tmp_path / "cache"))
    assert f"download {url}, extract it there" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("val/images/val_2.JPEG", "val_2.JPEG: expected all images of val_annotations.txt, 1 are missing"),
        ("val/val_annotations.txt", "val_annotations.txt: expected this file .No such file"),
        ("words.txt", "words.txt: expected this file .No such file"),
        ("train/n01/images", "images: expected .JPEG images, found none; extract http"),
    ],
)
def test_incomplete_tiny_imagenet_is_refused(tiny: Path, path: str, message: str) -> None:
    (tiny / path).rename(tiny.parent / "elsewhere")
    with pytest.raises(UsageError, match=message):
        read(published.tiny_imagenet, tiny)


def test_broken_file_names_its_archive(tiny: Path, nette: Path) -> None:
    """These data sets have no option to skip broken files."""
    for base, reader, url in (
        (tiny, published.tiny_imagenet, published.TINY_IMAGENET),
        (nette, published.imagenette, published.IMAGENETTE),
    ):
        file = next((base / "train").rglob("*.JPEG"))
        file.write_text("x")
        with pytest.raises(UsageError) as error:
            read(reader, base)
        assert re.search(
            rf"{file.name}: expected a readable image .*; extract {url} again$", str(error.value)
        )


def test_class_names_are_unique() -> None:
    words = {"n1": "crane, bird", "n2": "crane, machine", "n3": "goldfish, Carassius auratus"}
    assert published.class_names(words) == ["crane, bird", "crane, machine", "goldfish"]
