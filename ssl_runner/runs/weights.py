"""Exported weights: safetensors files with the tensor names of torchvision and timm, and a JSON header."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_runner.errors import UsageError, counted
from ssl_runner.runs import foreign, other_backbone
from ssl_runner.runs.files import atomic_write

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
        if isinstance(tensor, Tensor)
    }
    if left_out := len(module.state_dict()) - len(state):
        entries = counted(left_out, "entry", "entries")
        print(
            f"{path.name}: left out {entries} of the state, since only tensors can be exported",
            file=sys.stderr,
        )
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


def mismatch(backbone: nn.Module, path: Path, options: Mapping[str, Any] | None) -> str:
    """Say what a file of `export` has instead of a backbone's tensors: other options, or a first tensor."""
    header = read_header(path) or {}
    known = options or {}
    if known and header.keys() >= known.keys() and (advice := other_backbone.advice(known, header)):
        return advice
    tensors = plain_names(safetensors.torch.load_file(path))
    full = plain_names(backbone.state_dict())
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (full, tensors)]
    name = next((name for name in {**full, **tensors} if shapes[0].get(name) != shapes[1].get(name)), "")
    return (
        f"expected {name} of shape {shapes[0].get(name)}, found {shapes[1].get(name)}; give the"
        " backbone.safetensors of a run with this backbone"
    )


def load_backbone(backbone: nn.Module, path: Path, options: Mapping[str, Any] | None = None) -> str:
    """Load initial weights into a backbone. Returns a line that states which tensors were loaded.

    A file that `export` wrote must contain all tensors of the backbone. From another safetensors file, or
    from a checkpoint of torch.save, the tensors with the backbone's names and shapes are loaded. `foreign`
    describes which names are recognised. `options` are those of the backbone, as `export` writes them
    (`backbone`, `channels`, `image_size`), for the error message.

    Raises UsageError if the file does not exist, cannot be read without executing pickled code, does not
    match the backbone (own files) or has none of its tensors (other files).
    """
    if not path.is_file():
        accepted = "a file, not a folder" if path.is_dir() else "an existing file"
        raise UsageError(
            f"init_weights={path}: expected {accepted}; give the backbone.safetensors of a finished run, or"
            " a checkpoint of torchvision, timm, lightly or solo-learn"
        )
    full = backbone.state_dict()
    plain = plain_names(full)
    if is_exported(path):
        try:
            load_exported(backbone, path)
        except RuntimeError as error:
            raise UsageError(f"init_weights={path}: {mismatch(backbone, path, options)}") from error
        return f"init_weights: {len(full)} of {counted(len(full), 'tensor')} matched"
    body = backbone if plain is full else backbone.get_submodule("body")
    found = foreign.match(body, plain, content := foreign.read(path))
    if found.size == 0:
        present = [name for _, state in foreign.state_dicts(content) for name in state]
        raise UsageError(
            f"init_weights={path}: expected tensors of this backbone ({foreign.shorten(list(plain), 2)}),"
            f" found {foreign.shorten(present, 2) or 'no tensors'}; choose the backbone that the file was"
            " saved from"
        )
    names = dict(zip(plain, full, strict=True))
    backbone.load_state_dict({names[name]: tensor for name, tensor in found.found.items()}, strict=False)
    return f"init_weights: {found}"


def is_exported(path: Path) -> bool:
    """Return whether `export` wrote the file."""
    try:
        return read_header(path) is not None
    except (OSError, safetensors.SafetensorError):
        return False
