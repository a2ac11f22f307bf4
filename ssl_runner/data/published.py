"""Tiny ImageNet and Imagenette, read from folders that hold them as published. They are not downloaded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssl_runner.data.contents import listed
from ssl_runner.data.dataset import Source
from ssl_runner.data.decoded import decode_files
from ssl_runner.data.readers import NONE
from ssl_runner.data.skipped import Skipped
from ssl_runner.errors import UsageError

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IMAGENETTE_FOLDERS = ("imagenette2-320", "imagenette2", "imagenette2-160")
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}

Labelled = list[tuple[Path, str]]  # image files, each with the WordNet ID of its class


def tiny_imagenet(root: str | None, size: int | None, channels: int | None, cache: str) -> Source:
    """Return Tiny ImageNet: 100,000 training images, and the 10,000 validation images as the test split.

    `root` is tiny-imagenet-200 or the folder around it. The published test images have no labels and are
    skipped. Images are decoded once into a file in `cache`, as those of `dataset=folder`. `size` is 64 as
    published; `channels` is 1 or 3, with None for 3.

    Raises UsageError if the folder is missing or is not complete.
    """
    base = _find(root, ("tiny-imagenet-200",), "wnids.txt", "Tiny ImageNet", TINY_IMAGENET)
    ids = sorted((base / "wnids.txt").read_text().split())
    lines = [line.split("\t") for line in _lines(base / "val" / "val_annotations.txt", TINY_IMAGENET)]
    train = [(file, one) for one in ids for file in _images(base / "train" / one / "images", TINY_IMAGENET)]
    present = set(_images(base / "val" / "images", TINY_IMAGENET))
    test = [(base / "val" / "images" / line[0], line[1]) for line in lines]
    if missing := [file for file, _ in test if file not in present]:
        raise UsageError(
            f"{missing[0]}: expected all images of val_annotations.txt, {len(missing)} are missing;"
            f" extract {TINY_IMAGENET} again"
        )
    words = dict(line.split("\t", 1) for line in _lines(base / "words.txt", TINY_IMAGENET))
    names = {one: words.get(one, one) for one in ids}
    data = _source(base, train, test, names, size, channels, cache, TINY_IMAGENET)
    skipped = Skipped()
    for file in sorted((base / "test").rglob("*.JPEG")):
        skipped.add("unlabelled test images", file)
    return replace(data, skipped=skipped)


def imagenette(root: str | None, size: int | None, channels: int | None, cache: str) -> Source:
    """Return Imagenette: 9,469 training images, and the 3,925 validation images as the test split.

    `root` is imagenette2-320, imagenette2 or imagenette2-160, or the folder around it; the first of these
    names is used. Images are centre-cropped to a square, resized to size x size, and decoded once into a file
    in `cache`, as those of `dataset=folder`. `channels` is 1 or 3, with None for 3.

    Raises UsageError if the folder is missing or is not complete.
    """
    base = _find(root, IMAGENETTE_FOLDERS, "val", "Imagenette", IMAGENETTE)
    train, test = (
        [(file, one) for one in IMAGENETTE_CLASSES for file in _images(base / part / one, IMAGENETTE)]
        for part in ("train", "val")
    )
    return _source(base, train, test, IMAGENETTE_CLASSES, size, channels, cache, IMAGENETTE)


def _source(
    base: Path,
    train: Labelled,
    test: Labelled,
    names: dict[str, str],
    size: int | None,
    channels: int | None,
    cache: str,
    url: str,
) -> Source:
    """Decode the files, which are in `base` and come from `url`.

    names: WordNet ID -> class name, in the order of the labels.
    """
    number = {one: label for label, one in enumerate(names)}
    files = [file for file, _ in (*train, *test)]
    labels = torch.tensor([number[one] for _, one in (*train, *test)])
    images, _ = decode_files(files, size, cache, channels or 3, repair=f"extract {url} again")
    rows = np.arange(len(files))
    n = len(train)
    return Source(
        images,
        labels,
        class_names(names),
        rows[:n],
        rows[n:],
        NONE,
        mapped=True,
        layout=base.name,
        **listed(files, base),
    )


def class_names(names: dict[str, str]) -> list[str]:
    """WordNet ID -> words separated by commas. Returns the first word, or all words if it is not unique."""
    first = {one: words.partition(",")[0] for one, words in names.items()}
    count = Counter(first.values())
    return [first[one] if count[first[one]] == 1 else words for one, words in names.items()]


def _find(root: str | None, folders: Sequence[str], entry: str, title: str, url: str) -> Path:
    """Return the folder with `entry`: a folder of these names in `root`, or `root` itself."""
    if root is not None:
        path = Path(root).expanduser()
        for base in (*(path / name for name in folders), path):
            if (base / "train").is_dir() and (base / entry).exists():
                return base.resolve()
    raise UsageError(
        f"dataset.root={'null' if root is None else root}: expected the folder that contains {title} as"
        f" {' or '.join(folders)}; download {url}, extract it there, or set dataset.root"
    )


def _lines(file: Path, url: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{file}: expected this file ({error.strerror}); extract {url} again") from error


def _images(folder: Path, url: str) -> list[Path]:
    """Return the .JPEG files of a folder, sorted by name. Raises UsageError if it has none."""
    if found := sorted(folder.glob("*.JPEG")):
        return found
    raise UsageError(f"{folder}: expected .JPEG images, found none; extract {url} again")
