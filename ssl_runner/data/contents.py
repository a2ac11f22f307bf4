"""What a data set consists of: names and lengths of its files, and a digest that changes with its images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_runner.data.skipped import printable


def listed(files: Sequence[Path], base: Path) -> dict[str, Any]:
    """The fields `files` and `file_bytes` of a `Source` that is read from these files.

    Names are relative to `base`, or absolute for files elsewhere. Bytes that are not UTF-8 become escapes.
    """
    names = [file.relative_to(base) if file.is_relative_to(base) else file for file in files]
    sizes = np.array([length(file) for file in files], dtype=np.int64)
    return {"files": list(map(printable, names)), "file_bytes": sizes}


def length(file: Path) -> int:
    """Return the length of a file in bytes, -1 if it cannot be accessed, as for a name with a null byte."""
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return -1


def digest(classes: Sequence[str], files: Sequence[str] | None, *arrays: np.ndarray | None) -> str:
    """16 hexadecimal digits of the SHA-256 of class names, file names and arrays of integers.

    The arrays of a data set are its labels, the indices of its splits and the lengths of its files. Pixels
    are not read: a file that changes but keeps its name and length gives the same digest.
    """
    sha256 = hashlib.sha256(repr(list(classes)).encode())
    for array in arrays:
        sha256.update(b"none" if array is None else b"%d " % len(array) + array.astype("<i8").tobytes())
    for name in files or ():
        sha256.update(name.encode() + b"\0")
    return sha256.hexdigest()[:16]
