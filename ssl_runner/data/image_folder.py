"""Images of your own, from folders or a list of files, decoded once into a memory-mapped file."""

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from math import prod
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_runner.data import decode
from ssl_runner.data.contents import listed
from ssl_runner.data.dataset import Source
from ssl_runner.data.file_list import read_list
from ssl_runner.data.layouts import Listing, read_layout
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError, one_line
from ssl_runner.names import ON_ERROR
from ssl_runner.runs.files import read_json, write_json

BLOCK_BYTES = 2**26  # of decoded images between two records of the progress
# what Pillow raises for damaged files
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
DAMAGED_DATA = (struct.error, zlib.error, Image.DecompressionBombError)


def folder(
    root: str | Sequence[str] | None,
    size: int | None,
    cache: str,
    files: str | None = None,
    labels: bool | None = None,
    on_error: str = "refuse",
    channels: int | None = None,
) -> Source:
    """Return image files of any format Pillow reads, from one or more folders or from a list.

    root       folder, or folders with the same layout (`layouts.read_layout`)
    size       with `size`, images are centre-cropped to a square and resized to size x size; without it they
               must be square and have the same size
    cache      folder of the decoded images (`decode_files`)
    files      instead of root: a CSV list (`file_list.read_list`)
    labels     whether sub-folders are classes, None to decide by looking
    on_error   "refuse" or "skip" files that cannot be read
    channels   3 for RGB, 1 for luma, None for 3

    Raises UsageError if the layout is unknown, if an image cannot be read, if the sizes differ, or if `cache`
    is not writable.
    """
    if on_error not in ON_ERROR:
        raise UsageError(f"dataset.on_error={on_error}: expected {' or '.join(ON_ERROR)}; use one of them")
    skip = on_error == "skip"
    if files is not None:
        if root is not None:
            raise UsageError(f"dataset.files={files}: expected dataset.root=null beside it; set one of them")
        listing, base = read_list(files, labels), Path(files).expanduser().resolve().parent
    else:
        roots = _roots(root)
        listing, base = read_layout(roots, labels, skip), Path(os.path.commonpath(roots))
    listing = _readable(listing, skip)
    images, broken = decode_files(listing.files, size, cache, channels or 3, skip)
    for row in broken:
        listing.skipped.add("broken", listing.files[row])
    return replace(_source(listing, images, broken), **listed(listing.files, base))


def _roots(root: str | Sequence[str] | None) -> list[Path]:
    """The folders of dataset.root. Raises UsageError unless they exist."""
    paths = [Path(one).expanduser() for one in ([root] if isinstance(root, str) else root or [])]
    if not paths or not all(path.is_dir() for path in paths):
        given = next((path for path in paths if not path.is_dir()), None)
        raise UsageError(
            f"dataset.root={given if given is None else printable(given)}: expected a folder of images, such"
            " as <class>/* or train/<class>/*; set dataset.root to one, or dataset.files to a list"
        )
    return [path.resolve() for path in paths]


def _readable(listing: Listing, skip: bool) -> Listing:
    """The listing without files that do not exist or cannot be accessed. Raises UsageError unless `skip`."""
    kept = Listing(listing.layout, listing.skipped, classes=listing.classes)
    for file, label, split in zip(listing.files, listing.labels, listing.splits, strict=True):
        try:
            file.stat()
        except OSError as error:
            if not skip:
                raise UsageError(
                    f"{printable(file)}: expected a readable file ({error.strerror}); repair or remove it, or"
                    " set dataset.on_error=skip"
                ) from error
            kept.skipped.add("unreadable", file)
        else:
            kept.add([file], label, split)
    return kept


def _source(listing: Listing, images: Tensor, broken: dict[int, str]) -> Source:
    """The splits of a listing without its broken files. Raises UsageError if a class has lost all images."""
    labels, splits = np.array(listing.labels), np.array(listing.splits)
    splits[list(broken)] = "broken"
    rows = {split: np.flatnonzero(splits == split) for split in ("train", "val", "test", "unlabeled")}
    sizes = np.bincount(labels[rows["train"]], minlength=len(listing.classes))
    if empty := [name for name, n in zip(listing.classes, sizes, strict=True) if not n]:
        raise UsageError(
            f"dataset.on_error=skip: expected a readable training image in each class, found none in"
            f" {', '.join(empty)}; repair some or remove the class"
        )
    if not len(rows["train"]) + len(rows["unlabeled"]):
        raise UsageError("dataset.on_error=skip: expected at least one readable image; repair the files")
    return Source(
        images,
        torch.from_numpy(labels).long(),
        listing.classes,
        rows["train"],
        rows["test"],
        rows["unlabeled"],
        mapped=True,
        val=rows["val"] if len(rows["val"]) else None,
        layout=listing.layout,
        skipped=listing.skipped,
    )


def decode_files(
    files: Sequence[Path], size: int | None, cache: str, channels: int = 3, skip_broken: bool = False
) -> tuple[Tensor, dict[int, str]]:
    """Return all images, (n, channels, side, side) uint8, in a memory-mapped file, and the broken ones.

    Images are decoded once, in parallel, into a file in `cache`. The file is reused as long as the path,
    length and modification time of every file, `size`, `channels` and the version of the decoding are
    unchanged. An interrupted decode resumes at its last complete block. One process decodes at a time.

    With `skip_broken`, images that cannot be read are black, and are returned as index -> reason. Otherwise
    they raise UsageError, as do images of different sizes, and a `cache` that is not writable.
    """
    signature = hashlib.sha256(f"{decode.VERSION} {size} {channels}\n".encode())
    for file in files:
        status = file.stat()
        signature.update(os.fsencode(file) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    decoded = Path(cache).expanduser() / f"folder-{signature.hexdigest()[:32]}.npy"
    try:
        decoded.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(decoded.with_suffix(".lock")):
            if not (decoded.is_file() and decoded.with_suffix(".json").is_file()):
                _decode(files, size, channels, decoded, skip_broken)
    except OSError as error:
        raise UsageError(
            f"dataset.cache={cache}: expected a writable folder with enough space ({error.strerror});"
            " set another one"
        ) from error
    broken = {int(row): reason for row, reason in read_json(decoded.with_suffix(".json"))["broken"].items()}
    for row, reason in broken.items():
        if not skip_broken:
            raise _unreadable(files[row], reason)
    return torch.from_numpy(np.load(decoded, mmap_mode="c")), broken


def _unreadable(file: Path, reason: str) -> UsageError:
    return UsageError(
        f"{printable(file)}: expected a readable image ({reason}); repair or remove it, or set"
        " dataset.on_error=skip"
    )


def _decode(files: Sequence[Path], size: int | None, channels: int, target: Path, skip_broken: bool) -> None:
    """Decode image files into `target`, one .npy array (n, channels, side, side) uint8.

    `side` is `size`, or the side of the first image if `size` is None. Blocks of images are appended to
    <target>.partial, and <target>.progress records the complete ones. Both stay if the process is
    interrupted, and go if a file is refused. The broken images are in <target without .npy>.json.
    """
    partial, progress = (target.with_name(f"{target.name}.{end}") for end in ("partial", "progress"))
    side = size or _first_side(files, channels, skip_broken)
    shape, header = (channels, side, side), BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
    )
    done, broken = 0, {}
    if partial.exists() and progress.exists():
        done, broken = read_json(progress).values()
    block = max(1, BLOCK_BYTES // prod(shape))
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        with (
            tqdm(
                desc="decode", total=len(files), initial=done, unit="images", unit_scale=True, disable=None
            ) as bar,
            open(partial, "r+b" if done else "wb") as array,
        ):
            array.write(header.getvalue())
            array.seek(done * prod(shape), os.SEEK_CUR)
            array.truncate()
            for start in range(done, len(files), block):
                names = files[start : start + block]
                results = threads.map(lambda file: _read(file, size, channels), names)
                for row, (file, image) in enumerate(zip(names, results, strict=True), start):
                    if isinstance(image, str):
                        if not skip_broken:
                            raise _unreadable(file, image)
                        broken[str(row)] = image
                        array.seek(prod(shape), os.SEEK_CUR)
                    else:
                        _check_shape(file, image, shape, files[0])
                        array.write(image.tobytes())
                    bar.update()
                array.truncate()  # extends the file over black images
                array.flush()
                os.fsync(array.fileno())
                write_json(progress, {"rows": start + len(names), "broken": broken})
    except UsageError:
        partial.unlink()
        progress.unlink(missing_ok=True)
        raise
    finally:
        threads.shutdown(cancel_futures=True)
    write_json(target.with_suffix(".json"), {"broken": broken})
    os.replace(partial, target)
    progress.unlink(missing_ok=True)


def _read(file: Path, size: int | None, channels: int) -> np.ndarray | str:
    """The pixels of a file, or why it cannot be read."""
    try:
        with Image.open(file) as image:
            return decode.pixels(image, size, channels)
    except (*DAMAGED, *DAMAGED_DATA) as error:
        return one_line(error)


def _first_side(files: Sequence[Path], channels: int, skip_broken: bool) -> int:
    """Side of the first readable image. Raises UsageError if it is not square, or if a file before it is
    broken, unless `skip_broken`."""
    for file in files:
        image = _read(file, None, channels)
        if not isinstance(image, str):
            height, width = image.shape[1:]
            if height != width:
                raise UsageError(
                    f"{printable(file)}: expected a square image, found {width} x {height} pixels;"
                    " set dataset.size=<side in pixels> to crop and resize all images"
                )
            return height
        if not skip_broken:
            raise _unreadable(file, image)
    raise _unreadable(files[0], "as all others")


def _check_shape(file: Path, image: np.ndarray, shape: tuple[int, int, int], first: Path) -> None:
    if image.shape != shape:
        raise UsageError(
            f"{printable(file)}: expected {shape[2]} x {shape[1]} pixels as in {printable(first.name)}, found"
            f" {image.shape[2]} x {image.shape[1]}; set dataset.size=<side in pixels> to crop and resize all"
            " images"
        )
