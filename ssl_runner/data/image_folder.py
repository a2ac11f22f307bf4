"""Folders of image files, decoded once into a memory-mapped file."""

import hashlib
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_runner.data import decode
from ssl_runner.data.dataset import Source
from ssl_runner.data.readers import NONE
from ssl_runner.errors import UsageError
from ssl_runner.runs.files import atomic_write

# formats that Pillow registers but that are not training images
DOCUMENTS = {"EPS", "HDF5", "MPEG", "GRIB", "BUFR", "FITS", "WMF", "PSD"}


def folder(root: str | None, size: int | None, cache: str) -> Source:
    """Return the images root/train/<class>/* and root/test/<class>/* as RGB, in any format Pillow reads.

    With `size`, images are centre-cropped to a square and resized to size x size. Without it they must be
    square and have the same size. Images are decoded once, in parallel, into a file in `cache`. The file is
    reused as long as the name, length and modification time of every image file are unchanged.

    Raises UsageError if `root` does not have this layout, if an image cannot be read, if the sizes differ, or
    if `cache` is not writable.
    """
    if root is None or not Path(root).expanduser().is_dir():
        raise UsageError(
            f"dataset.root={root}: expected a folder that contains train/<class>/* and test/<class>/*;"
            " set dataset.root to one"
        )
    base = Path(root).expanduser().resolve()
    listed = {part: _class_files(base, part) for part in ("train", "test")}
    classes = list(listed["train"])
    if classes != list(listed["test"]):
        odd = sorted(set(classes) ^ set(listed["test"]))
        raise UsageError(
            f"dataset.root={base}: expected the same classes in train and test; add or remove those in only"
            f" one: {', '.join(odd)}"
        )
    files = [file for part in listed.values() for of_class in part.values() for file in of_class]
    labels = [
        label for part in listed.values() for label, of_class in enumerate(part.values()) for _ in of_class
    ]
    split = sum(len(of_class) for of_class in listed["train"].values())

    images, _ = decode_files(files, size, cache)
    rows = np.arange(len(files))
    return Source(images, torch.tensor(labels), classes, rows[:split], rows[split:], NONE, mapped=True)


def decode_files(
    files: Sequence[Path], size: int | None, cache: str, channels: int = 3
) -> tuple[Tensor, dict[int, str]]:
    """Return all images, (n, channels, side, side) uint8, in a memory-mapped file, and no broken ones.

    Images are decoded once, in parallel, into a file in `cache`. Raises UsageError as `folder` does.
    """
    signature = hashlib.sha256(f"{decode.VERSION} {size} {channels}".encode())
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise UsageError(
                f"{file}: expected a readable file ({error.strerror}); repair or remove it"
            ) from error
        signature.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    decoded = Path(cache).expanduser() / f"folder-{signature.hexdigest()[:32]}.npy"
    try:
        decoded.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"dataset.cache={cache}: expected a writable folder ({error.strerror}); set another one"
        ) from error
    if not decoded.is_file():
        _decode(files, size, decoded, channels)
    return torch.from_numpy(np.load(decoded, mmap_mode="c")), {}


def _class_files(base: Path, part: str) -> dict[str, list[Path]]:
    """Return the image files of each class folder in base/part, sorted by name.

    Hidden files and other file types are skipped. Raises UsageError if base/part does not exist, has fewer
    than 2 class folders, or has one without images.
    """
    if not (base / part).is_dir():
        raise UsageError(
            f"dataset.root={base}: expected train/<class>/* and test/<class>/*, but {part} is missing;"
            " add it, or set dataset.root to another folder"
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
        raise UsageError(
            f"{base / part}: expected at least 2 class folders, found {len(found)};"
            " add one folder of image files per class"
        )
    for name, files in found.items():
        if not files:
            raise UsageError(
                f"{base / part / name}: expected image files (.jpg, .png, .webp, ...), found none;"
                " add some or remove the folder"
            )
    return found


def _decode(files: Sequence[Path], size: int | None, target: Path, channels: int) -> None:
    """Decode image files and write them to `target` as one .npy array (n, 3, side, side) uint8.

    The write is atomic. `side` is `size`, or the side of the first image if `size` is None. Raises UsageError
    if the first image is not square, or if another one has a different size.
    """
    shape = _read(files[0], size, channels).shape
    if shape[1] != shape[2]:
        raise UsageError(
            f"{files[0]}: expected a square image, found {shape[2]} x {shape[1]} pixels;"
            " set dataset.size=<side in pixels> to crop and resize all images"
        )
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
    with atomic_write(target, concurrent=True) as array, ThreadPoolExecutor(os.cpu_count()) as threads:
        np.lib.format.write_array_header_1_0(array, header)
        decoded = threads.map(lambda file: _read(file, size, channels), files)
        for row, image in enumerate(
            tqdm(decoded, "decode", total=len(files), unit="images", unit_scale=True, disable=None)
        ):
            if image.shape != shape:
                threads.shutdown(wait=False, cancel_futures=True)
                raise UsageError(
                    f"{files[row]}: expected {shape[2]} x {shape[1]} pixels as in {files[0].name}, found"
                    f" {image.shape[2]} x {image.shape[1]}; set dataset.size=<side in pixels> to crop and"
                    " resize all images"
                )
            array.write(image.tobytes())


def _read(file: Path, size: int | None, channels: int) -> np.ndarray:
    """The pixels of a file. Raises UsageError if it is not a readable image."""
    try:
        with Image.open(file) as image:
            return decode.pixels(image, size, channels)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UsageError(f"{file}: expected a readable image ({error}); repair or remove it") from error
