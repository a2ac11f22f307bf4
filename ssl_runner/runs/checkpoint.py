"""Checkpoints with a checksum, which are loaded without executing pickled code."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import OutOfMemoryError

from ssl_runner.background import Background
from ssl_runner.errors import UsageError
from ssl_runner.host_copy import HostCopy
from ssl_runner.runs import foreign
from ssl_runner.runs.filenames import CHECKPOINT, PREVIOUS
from ssl_runner.runs.files import atomic_write

# Written after the archive of torch.save, followed by its SHA-256 in hex. torch.load ignores both.
CHECKSUM_TAG = b"\nsha256 "


class ChecksumWriter:
    """File wrapper that computes the SHA-256 of all bytes written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def save(state: dict[str, Any], folder: Path) -> None:
    """Write `state` and its SHA-256 to checkpoint.pt; the previous checkpoint becomes checkpoint-before.pt.

    A crash at any time leaves at least one intact checkpoint.
    """
    with atomic_write(folder / CHECKPOINT) as file:
        writer: Any = ChecksumWriter(file)
        torch.save(state, writer)
        file.write(CHECKSUM_TAG + writer.sha256.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())  # before the existing checkpoint is renamed
        if (folder / CHECKPOINT).exists():
            os.replace(folder / CHECKPOINT, folder / PREVIOUS)


class Writer:
    """Writes the checkpoints of a run in its background thread.

    The calling thread only copies the state to host buffers, which are the same for all checkpoints. As a
    context manager it writes, on exit, the state that was held last.
    """

    def __init__(self, folder: Path, background: Background):
        self.folder, self.background, self.copy = folder, background, HostCopy()
        self.held: tuple[dict[str, Any], Callable[[], object]] | None = None
        self.writing: Future[None] | None = None

    def hold(self, state: dict[str, Any]) -> None:
        """Keep a copy of the state, to be written if the run ends before the next checkpoint.

        While a checkpoint is being written, which uses the buffers, nothing is kept.
        """
        if self.writing is None or self.writing.done():
            self._copy(state)

    def write(self, state: dict[str, Any]) -> None:
        """Start writing the state, once the previous checkpoint is on disk.

        Raises the error of the previous checkpoint, if it failed.
        """
        if self.writing is not None:
            self.writing.result()
        self._copy(state)
        self._write_held()

    def _copy(self, state: dict[str, Any]) -> None:
        self.held = None  # its buffers are overwritten; an interrupt leaves a part of the new state in them
        self.held = self.copy(state)

    def _write_held(self) -> None:
        if self.held is None:
            return
        (state, wait_for_copy), self.held = self.held, None

        def job() -> None:
            wait_for_copy()
            save(state, self.folder)

        self.writing = self.background.submit(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._write_held()
        except Exception:
            if error is None:
                raise  # otherwise the exit of `background` reports it


def find(folder: Path) -> Path | None:
    """Return the path of the newest intact checkpoint, or None if there is no checkpoint at all.

    A damaged checkpoint.pt is reported on stderr. It is renamed to checkpoint-damaged.pt, so that the next
    `save` does not overwrite the intact checkpoint-before.pt with it. Raises UsageError if all checkpoints
    are damaged.
    """
    existing = [path for path in (folder / CHECKPOINT, folder / PREVIOUS) if path.exists()]
    for path in existing:
        if is_intact(path):
            if path != existing[0]:
                os.replace(existing[0], folder / "checkpoint-damaged.pt")
            return path
        reason = "SHA-256 mismatch" if path.is_file() else "not a file"
        print(f"{path} is damaged ({reason}): skipped", file=sys.stderr, flush=True)
    if existing:
        names = " and ".join(path.name for path in existing)
        raise UsageError(
            f"{folder} has no intact checkpoint to resume from: remove {names} to train from the beginning"
        )
    return None


def is_intact(path: Path) -> bool:
    """Return whether the file ends with the SHA-256 of the preceding bytes."""
    if not path.is_file():
        return False
    remaining = path.stat().st_size - len(CHECKSUM_TAG) - 64
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while remaining > 0 and (block := file.read(min(remaining, 2**24))):
            sha256.update(block)
            remaining -= len(block)
        return file.read() == CHECKSUM_TAG + sha256.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Load the state that `save` wrote, onto the CPU, without executing pickled code.

    Raises UsageError if the file has something else.
    """
    with restoring(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"found {type(state).__name__}")
        return state


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn the errors of loading a state that does not belong to this run into a UsageError."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except foreign.UNREADABLE as error:
        raise UsageError(
            f"{path}: expected a checkpoint of this run ({foreign.why_unreadable(error)}); remove it to"
            " resume from the checkpoint before, or from the beginning if there is none"
        ) from error
