"""Folders and lists of image files: every layout, every odd file, and the cache of decoded images."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_runner.data import image_folder
from ssl_runner.data.dataset import Source
from ssl_runner.errors import UsageError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes: 12 x 12 images in several formats and modes, and other files to be skipped."""
    root = tmp_path / "pictures"
    for part, n in (("train", 8), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                colour = (20 * i, 100 * label, 7)
                image = Image.new("RGB", (12, 12), colour)
                if i == 1:
                    image = image.convert("L")
                if i == 2:
                    image = image.convert("P")
                image.save(root / part / name / f"{i}.{('png', 'bmp', 'gif', 'webp')[i % 4]}", lossless=True)
            (root / part / name / "notes.txt").write_text("not an image")
            (root / part / name / ".hidden.png").write_text("not an image either")
    return root


def read_folder(root: Path, size: int | None = None) -> Source:
    return image_folder.folder(str(root), size, str(root.parent / "cache"))


def test_folder_images_and_labels_are_in_file_order(pictures: Path) -> None:
    data = read_folder(pictures)
    assert data.images.shape == (22, 3, 12, 12)
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 8 + [1] * 8 + [0] * 3 + [1] * 3
    assert (len(data.train), len(data.test)) == (16, 6)
    files = [
        pictures / "train" / name / f"{i}.{('png', 'bmp', 'gif', 'webp')[i % 4]}"
        for name in data.classes
        for i in range(8)
    ]
    for row, file in enumerate(files):
        with Image.open(file) as image:
            assert np.array_equal(data.images[row].permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_folder_cache_is_reused_while_files_are_unchanged(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_folder(pictures).images.clone()
    decode, decoded = image_folder._decode, []

    def counting(files, *options):
        decoded.append(files)
        decode(files, *options)

    monkeypatch.setattr(image_folder, "_decode", counting)
    assert torch.equal(read_folder(pictures).images, first)
    assert decoded == []
    Image.new("RGB", (12, 12), (255, 255, 255)).save(pictures / "train" / "cat" / "0.png")
    changed = read_folder(pictures).images
    assert len(decoded) == 1
    assert (changed[0] == 255).all()
    assert torch.equal(changed[1:], first[1:])
    assert read_folder(pictures, size=6).images.shape == (22, 3, 6, 6)
    assert len(decoded) == 2


def test_folder_images_are_centre_cropped_and_resized(pictures: Path) -> None:
    wide = Image.new("RGB", (36, 12), (255, 0, 0))
    wide.paste((0, 0, 255), (12, 0, 24, 12))
    wide.save(pictures / "train" / "cat" / "0.png")
    image = read_folder(pictures, size=6).images[0]
    inner = image[:, :, 1:-1]  # the resampling filter crosses the edge of the crop
    assert torch.equal(inner, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 6, 4))


def test_folder_converts_16_bit_transparent_and_rotated_images(pictures: Path) -> None:
    """16-bit values are scaled, not clipped; transparent pixels are white; EXIF rotation is applied."""
    cat = pictures / "train" / "cat"
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(cat / "0.png")
    Image.new("RGBA", (12, 12), (255, 0, 0, 0)).save(cat / "4.png")
    turned = Image.new("RGB", (12, 12), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 0, 12, 6))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(cat / "5.png", exif=exif)
    (cat / "5.bmp").unlink()
    images = read_folder(pictures).images
    assert (images[0] == 40_000 >> 8).all()
    assert (images[4] == 255).all()
    assert images[5, :, 0, 0].tolist() == [255, 0, 0]
    assert images[5, :, -1, 0].tolist() == [0, 0, 255]


def test_invalid_folder_raises_one_line_usage_error(pictures: Path) -> None:
    def check_error(message: str, size: int | None = None) -> None:
        with pytest.raises(UsageError, match=message) as error:
            read_folder(pictures, size)
        assert "\n" not in str(error.value)
        assert not list((pictures.parent / "cache").glob("*.npy*"))

    odd = pictures / "train" / "cat" / "odd.png"
    Image.new("RGB", (9, 12)).save(odd)
    check_error("odd.png: expected 12 x 12 pixels as in 0.png, found 9 x 12; set dataset.size")
    odd.write_bytes((pictures / "train" / "cat" / "0.png").read_bytes()[:40])
    check_error("odd.png: expected a readable image", size=8)
    odd.write_text("hello")
    check_error("odd.png: expected a readable image")
    odd.unlink()
    odd.symlink_to(pictures / "gone.png")
    check_error("odd.png: expected a readable file .No such file")
    odd.unlink()
    (pictures / "train" / "cat" / "notes.pdf").write_text("not an image")
    (pictures / "train" / "bird").mkdir()
    check_error("bird: expected image files")
    Image.new("RGB", (12, 12)).save(pictures / "test" / "0.png")
    (pictures / "train" / "bird").rmdir()
    (pictures / "test" / "bird").mkdir()
    Image.new("RGB", (12, 12)).save(pictures / "test" / "bird" / "0.png")
    check_error("expected in test and val only classes of train; .* bird$")
    shutil.rmtree(pictures / "train")
    check_error("expected train beside test, but train is missing")
