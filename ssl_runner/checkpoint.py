"""Checkpoints that are whole or passed over, and that load without running code."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import nn

from ssl_runner.errors import Refused

NAME, BEFORE = "checkpoint.pt", "checkpoint-before.pt"
SEAL = b"\nsha256 "  # stands behind torch.save's archive, whose readers pass over it, and before the archive's digest


class Sealing:
    """A file that keeps the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def save(state: dict[str, Any], folder: Path) -> None:
    """Writes `state` to checkpoint.pt, sealed by its digest; the last one becomes checkpoint-before.pt. A crash at any moment
    leaves a whole one."""
    partial = folder / f"{NAME}.partial"
    with open(partial, "wb") as file:
        sealing: Any = Sealing(file)
        torch.save(state, sealing)
        file.write(SEAL + sealing.sha256.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    if (folder / NAME).exists():
        os.replace(folder / NAME, folder / BEFORE)
    os.replace(partial, folder / NAME)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written, None where there is none at all. Says on standard error which damaged one
    it passes over, and puts that aside, lest it take the other's place. Refused where all are damaged."""
    there = [path for path in (folder / NAME, folder / BEFORE) if path.exists()]
    for path in there:
        if whole(path):
            if path != there[0]:
                os.replace(there[0], folder / "checkpoint-damaged.pt")
            return path
        print(f"{path} is damaged, not as it was written: passed over", file=sys.stderr, flush=True)
    if there:
        names = " and ".join(path.name for path in there)
        raise Refused(
            f"{folder} has no whole checkpoint to go on from: remove {names} to train from the beginning"
        )
    return None


def whole(path: Path) -> bool:
    """Whether the file ends with the digest of all that stands before it."""
    left = path.stat().st_size - len(SEAL) - 64
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 2**24))):
            sha256.update(block)
            left -= len(block)
        return file.read() == SEAL + sha256.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU, read without unpickling code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def export(backbone: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """The backbone's weights as safetensors, with what is needed to rebuild and feed it as JSON in the header."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(state, partial, {"ssl_runner": json.dumps(metadata)})
    os.replace(partial, path)


def restore(backbone: nn.Module, path: Path) -> None:
    """Loads the weights that `export` wrote into a backbone of the same shape. Refused for any other file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file"
        raise Refused(f"weights={path} {what}: give the backbone.safetensors of a finished run")
    try:
        backbone.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise Refused(
            f"weights={path} does not fit this backbone or is not a safetensors file ({reason[:200]})"
        ) from error
