"""Checkpoints that are whole or absent, and that load without running code."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ssl_runner.errors import Refused


def save(state: dict[str, Any], path: Path) -> None:
    """Writes `state` to `path` atomically: a crash at any moment leaves the old checkpoint or the new one."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU, read without unpickling code. Refused where there is none."""
    if not path.is_file():
        raise Refused(f"resume: {path} does not exist: the run has not finished its first epoch, start it anew")
    return torch.load(path, map_location="cpu", weights_only=True)


def export(backbone: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """The backbone's weights as safetensors, with what is needed to rebuild and feed it as JSON in the header."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in backbone.state_dict().items()
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
        raise Refused(f"weights={path} does not fit this backbone or is not a safetensors file ({reason[:200]})") from error
