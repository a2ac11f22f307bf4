"""Exported weights: safetensors files with the tensor names of torchvision and timm, and a JSON header."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_runner.errors import UsageError, one_line
from ssl_runner.runs.files import atomic_write

BACKBONE, PROJECTOR = "backbone.safetensors", "projector.safetensors"
HEADER = "ssl_runner"  # key of the JSON in the header of a file


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix `body.` of a `Backbone` from all names, or return `state` if one lacks it.

    The result has the names of the wrapped network, such as a torchvision or timm model.
    """
    if not all(name.startswith("body.") for name in state):
        return state
    return {name.removeprefix("body."): tensor for name, tensor in state.items()}


def export(module: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Write the weights of a module under their plain names to a safetensors file.

    `metadata`, the information needed to rebuild the module and preprocess its input, is stored in the header
    as JSON. A module without tensors writes no file.
    """
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in plain_names(module.state_dict()).items()
    }
    if state:
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(state, {HEADER: json.dumps(metadata)}))


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the metadata that `export` wrote, or None if ssl_runner did not write the file.

    Raises OSError or SafetensorError if the file is not a readable safetensors file.
    """
    with safetensors.safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(HEADER)
    return None if header is None else json.loads(header)


def load_exported(module: nn.Module, path: Path) -> None:
    """Load a file that `export` wrote, with or without the prefix `body.`, into an equal module.

    Raises RuntimeError if names or shapes differ, and OSError or SafetensorError if the file cannot be read.
    """
    full, state = module.state_dict(), plain_names(safetensors.torch.load_file(path))
    names = dict(zip(plain_names(full), full, strict=True))
    module.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()})


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load weights written by `export` into a backbone of the same architecture.

    Raises UsageError if the file does not exist, is not a safetensors file, or does not match the backbone.
    """
    if not path.is_file():
        accepted = "a file, not a folder" if path.is_dir() else "an existing file"
        raise UsageError(
            f"init_weights={path}: expected {accepted}; give the backbone.safetensors of a finished run"
        )
    try:
        load_exported(backbone, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = one_line(error)
        raise UsageError(
            f"init_weights={path}: expected safetensors weights of this backbone; use the backbone options"
            f" of the run that wrote the file ({reason[:200]})"
        ) from error
