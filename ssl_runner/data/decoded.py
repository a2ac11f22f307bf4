"""Images decoded once into a memory-mapped file, from files or other sources."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from ssl_runner.data import decode
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError, one_line
from ssl_runner.progress import image_progress
from ssl_runner.runs.files import read_json, write_json

BLOCK_BYTES = 2**26  # of decoded images between two records of the progress
QUIET_WAIT = 5.0  # seconds to wait for another process before a line reports it


class Encoded(Protocol):
    """An image that is not decoded yet. `str` is its name in messages, `name` a short form of it."""

    @property
    def name(self) -> str: ...

    def open(self) -> Image.Image:
        """Open the image with Pillow. Raises one of `decode.DAMAGED` if it cannot be read."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    def __str__(self) -> str:
        return printable(self.path)

    @property
    def name(self) -> str:
        return printable(self.path.name)

    def open(self) -> Image.Image:
        return Image.open(self.path)


def decode_files(
    files: Sequence[Path],
    size: int | None,
    cache: str,
    channels: int = 3,
    skip_broken: bool = False,
    repair: str = "repair or remove it, or set dataset.on_error=skip",
) -> tuple[Tensor, dict[int, Exception]]:
    """`decode_images` for image files.

    The decoded file is reused as long as the path, length and modification time of every file, `size`,
    `channels` and the version of the decoding are unchanged.
    """
    signature = hashlib.sha256(f"{decode.VERSION} {size} {channels}\n".encode())
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:
            if not skip_broken:
                raise _unreadable(ImageFile(file), error, repair) from error
            state = "unreadable"
        signature.update(os.fsencode(file) + f" {state}\n".encode())
    images = [ImageFile(file) for file in files]
    key = f"folder-{signature.hexdigest()[:32]}"
    return decode_images(images, key, size, cache, channels, skip_broken, repair)


def decode_images(
    encoded: Sequence[Encoded],
    key: str,
    size: int | None,
    cache: str,
    channels: int,
    skip_broken: bool,
    repair: str,
) -> tuple[Tensor, dict[int, Exception]]:
    """Return all images, (n, channels, side, side) uint8, in a memory-mapped file, and the broken ones.

    Images are decoded once, in parallel, into <cache>/<key>.npy. `key` changes with the images, `size` and
    `channels`. Only broken images are read again. An interrupted decode resumes at its last complete block.
    One process decodes at a time.

    With `skip_broken`, images that cannot be read are black, and are returned as index -> error. Otherwise
    they raise UsageError, as do images of different sizes, and a `cache` that is not writable. `repair` is
    the remedy in the message about an image that cannot be read.
    """
    decoded = Path(cache).expanduser() / f"{key}.npy"
    try:
        if not _is_finished(decoded):
            decoded.parent.mkdir(parents=True, exist_ok=True)
            with _locked(decoded), decode.large_images():
                if not _is_finished(decoded):
                    _decode(encoded, size, channels, decoded, skip_broken, repair)
        with decode.large_images():
            broken = _read_again(encoded, size, channels, decoded)
    except OSError as error:
        raise UsageError(
            f"dataset.cache={cache}: expected a writable folder with enough space ({error.strerror});"
            " set another one"
        ) from error
    if broken and not skip_broken:
        row, reason = next(iter(broken.items()))
        raise _unreadable(encoded[row], reason, repair)
    return torch.from_numpy(np.load(decoded, mmap_mode="c")), broken


def _is_finished(decoded: Path) -> bool:
    return decoded.is_file() and decoded.with_suffix(".json").is_file()


@contextmanager
def _locked(decoded: Path) -> Iterator[None]:
    """Hold the lock of a decoded file. Reports on standard error that another process holds it."""
    lock = FileLock(decoded.with_suffix(".lock"))
    with suppress(Timeout):
        lock.acquire(timeout=QUIET_WAIT)
    if not lock.is_locked:
        print(f"waiting for another process that decodes the same images: {lock.lock_file}", file=sys.stderr)
        lock.acquire()  # not in an `except` clause, where a signal to end the run would have to wait
    try:
        yield
    finally:
        lock.release()


def is_missing(error: Exception) -> TypeGuard[OSError]:
    """Whether the system cannot open or read a file, independently of its content."""
    return isinstance(error, OSError) and error.errno is not None


def _unreadable(image: Encoded, error: Exception, repair: str) -> UsageError:
    what, reason = ("file", error.strerror) if is_missing(error) else ("image", one_line(error))
    return UsageError(f"{image}: expected a readable {what} ({reason}); {repair}")


def _decode(
    encoded: Sequence[Encoded],
    size: int | None,
    channels: int,
    target: Path,
    skip_broken: bool,
    repair: str,
) -> None:
    """Decode images into `target`, one .npy array (n, channels, side, side) uint8.

    `side` is `size`, or the side of the first image if `size` is None. Blocks of images are appended to
    <target>.partial, and <target>.progress records the complete ones. Both stay if the process is
    interrupted, or if a broken file is refused. The rows of broken images are in <target without .npy>.json.
    """
    partial, progress = (target.with_name(f"{target.name}.{end}") for end in ("partial", "progress"))
    side = size or _first_side(encoded, channels, skip_broken, repair)
    shape, header = (channels, side, side), BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (len(encoded), *shape)}
    )
    done, broken = 0, []
    if partial.exists() and progress.exists():
        content = read_json(progress)
        done, broken = content["rows"], [int(row) for row in content["broken"]]
    block = max(1, BLOCK_BYTES // prod(shape))
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        with (
            image_progress("decode", len(encoded), done) as bar,
            open(partial, "r+b" if done else "wb") as array,
        ):
            array.write(header.getvalue())
            array.seek(done * prod(shape), os.SEEK_CUR)
            array.truncate()
            for start in range(done, len(encoded), block):
                chunk = encoded[start : start + block]
                results = threads.map(lambda one: _read(one, size, channels), chunk)
                for row, (one, image) in enumerate(zip(chunk, results, strict=True), start):
                    if isinstance(image, np.ndarray):
                        if image.shape != shape:
                            progress.unlink(missing_ok=True)  # another size or list has another target
                            raise _other_shape(one, image, shape, encoded[0])
                        array.write(image.tobytes())
                    elif skip_broken:
                        broken.append(row)
                        array.seek(prod(shape), os.SEEK_CUR)
                    else:
                        raise _unreadable(one, image, repair)
                    bar.update()
                array.truncate()  # extends the file over black images
                array.flush()
                os.fsync(array.fileno())
                write_json(progress, {"rows": start + len(chunk), "broken": broken})
    except UsageError:
        if not progress.exists():
            partial.unlink()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
    write_json(target.with_suffix(".json"), {"broken": broken})
    os.replace(partial, target)
    progress.unlink(missing_ok=True)


def _read_again(
    encoded: Sequence[Encoded], size: int | None, channels: int, decoded: Path
) -> dict[int, Exception]:
    """Read the broken images of a decoded file once more, since access to a file is not part of its name.

    Images that can be read now are stored. Returns the errors of the others.
    """
    record = decoded.with_suffix(".json")
    rows = [int(row) for row in read_json(record)["broken"]]
    broken: dict[int, Exception] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        images = threads.map(lambda row: _read(encoded[row], size, channels), rows)
        for row, image in zip(rows, images, strict=True):
            if isinstance(image, np.ndarray):
                array = np.load(decoded, mmap_mode="r+")
                if image.shape != array.shape[1:]:
                    raise _other_shape(encoded[row], image, array.shape[1:], encoded[0])
                array[row] = image
                array.flush()
            else:
                broken[row] = image
    if len(broken) < len(rows):
        write_json(record, {"broken": list(broken)})
    return broken


def _read(encoded: Encoded, size: int | None, channels: int) -> np.ndarray | Exception:
    """The pixels of an image, or why it cannot be read."""
    try:
        with encoded.open() as image:
            return decode.pixels(image, size, channels)
    except decode.DAMAGED as error:
        return error.with_traceback(None)  # a traceback would hold the image


def _first_side(encoded: Sequence[Encoded], channels: int, skip_broken: bool, repair: str) -> int:
    """Side of the first readable image. Raises UsageError if it is not square, if all images are broken, or
    if one before it is, unless `skip_broken`."""
    for one in encoded:
        image = _read(one, None, channels)
        if isinstance(image, np.ndarray):
            height, width = image.shape[1:]
            if height != width:
                raise UsageError(
                    f"{one}: expected a square image, found {width} x {height} pixels;"
                    " set dataset.size=<side in pixels> to crop and resize all images"
                )
            return height
        if not skip_broken:
            raise _unreadable(one, image, repair)
    raise none_readable()


def none_readable() -> UsageError:
    return UsageError("dataset.on_error=skip: expected at least one readable image; repair the files")


def _other_shape(one: Encoded, image: np.ndarray, shape: tuple[int, ...], first: Encoded) -> UsageError:
    return UsageError(
        f"{one}: expected {shape[2]} x {shape[1]} pixels as in {first.name}, found"
        f" {image.shape[2]} x {image.shape[1]}; set dataset.size=<side in pixels> to crop and resize all"
        " images"
    )
