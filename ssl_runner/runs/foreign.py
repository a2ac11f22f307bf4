"""Weights of other libraries: find the tensors of a backbone in a checkpoint, by name and shape."""

import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_runner.errors import UsageError, counted, one_line

# Names of modules that contain a backbone, in the order of preference among equal matches.
WRAPPERS = (
    *("backbone", "encoder", "module", "model", "body", "net", "network", "trunk", "_orig_mod", "encoder_q"),
    *("base_encoder", "online_encoder", "online_network", "student_backbone", "student", "teacher_backbone"),
    *("teacher", "momentum_encoder", "momentum_backbone", "backbone_momentum", "encoder_k", "target_encoder"),
)
# What torch.load raises for a file that is not a checkpoint, or that contains pickled objects.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(struct.error, pickle.UnpicklingError, safetensors.SafetensorError),
)
NO_ARCHIVE = (EOFError, IndexError, struct.error, pickle.UnpicklingError, safetensors.SafetensorError)
# Keys of averaged weights, which are preferred among equal matches.
AVERAGED = ("state_dict_ema", "model_ema", "teacher")


@dataclass
class Match:
    """The tensors of a checkpoint that have the names and shapes of a backbone's tensors.

    found       name in the backbone -> tensor
    mismatched  tensors of the same name and another shape, in words
    missing     names in the backbone that the checkpoint lacks
    ignored     number of other tensors in the checkpoint, such as those of a classifier or projector
    source      key and prefix of the names in the checkpoint, in words
    """

    found: dict[str, Tensor]
    mismatched: list[str]
    missing: list[str]
    ignored: int
    source: str

    @property
    def size(self) -> int:
        """Number of matching tensors, without scalars such as the batch counters of batch norm."""
        return sum(tensor.ndim > 0 for tensor in self.found.values())

    def __str__(self) -> str:
        total = len(self.found) + len(self.mismatched) + len(self.missing)
        parts = [
            f"{len(self.found)} of {counted(total, 'tensor')} matched{self.source}",
            f"not loaded: {shorten(self.mismatched)}" if self.mismatched else "",
            f"not in the file: {shorten(self.missing)}" if self.missing else "",
            f"ignored: {counted(self.ignored, 'other tensor')} of the file" if self.ignored else "",
        ]
        return "; ".join(filter(None, parts))


def shorten(names: list[str], most: int = 5) -> str:
    """Join names with commas, and replace those after the first `most` by their number."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read(path: Path) -> Mapping[str, Any]:
    """Read a safetensors file or a checkpoint of torch.save, onto the CPU, without executing pickled code.

    Raises UsageError if the file is neither, or if it contains objects other than tensors and plain values.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        pass  # not a safetensors file
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UsageError(
            f"init_weights={path}: expected a safetensors file, or a checkpoint of tensors only"
            f" ({why_unreadable(error)}); save its state dict alone, with torch.save or safetensors"
        ) from error
    return content if isinstance(content, Mapping) else {}


def why_unreadable(error: BaseException) -> str:
    """Return the reason for one of UNREADABLE, without torch's advice to execute the pickled code."""
    text = one_line(error)
    if pickled := re.search(r"GLOBAL (\S+)", text):
        return f"it contains a pickled {pickled[1]}"
    if isinstance(error, NO_ARCHIVE):
        return "it is no archive of torch.save, or contains pickled objects"
    return f"it lacks {text}" if isinstance(error, KeyError) else text[:200]


def state_dicts(content: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping that holds tensors, with its dotted key within the checkpoint."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from state_dicts(value, f"{key}.{name}" if key else str(name))


def prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of `names` that consist of wrappers' names, in the order of preference."""
    found = {""}
    for name in names:
        for prefix in accumulate(f"{part}." for part in name.split(".")):
            if prefix.rstrip(".").rpartition(".")[2] not in WRAPPERS:
                break
            found.add(prefix)
    return sorted(found, key=lambda prefix: [WRAPPERS.index(part) for part in prefix.split(".")[:-1]])


def match(body: nn.Module, target: Mapping[str, Tensor], content: Mapping[str, Any]) -> Match:
    """Return the best match of `target`, the plain state dict of `body`, in the content of a checkpoint.

    Every mapping of tensors in the checkpoint is tried with every prefix of wrappers' names. The names may
    also start with the positions of the children of `body`, as in nn.Sequential(*body.children()). The match
    with most tensors is returned.
    """
    positions = {str(i): name for i, (name, _) in enumerate(body.named_children())}
    candidates = sorted(state_dicts(content), key=lambda item: item[0] not in AVERAGED)
    best = Match({}, [], list(target), 0, "")
    for key, state in candidates:
        for prefix in prefixes(state):
            inner = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
            by_position = {rename(name, positions): tensor for name, tensor in inner.items()}
            for names, numbered in ((inner, False), (by_position, True)):
                found = compare(target, names, len(state), describe(key, prefix, numbered))
                best = max(best, found, key=lambda candidate: candidate.size)
    return best


def rename(name: str, positions: Mapping[str, str]) -> str:
    """Replace the position of a child at the start of a name by the name of the child."""
    first, dot, rest = name.partition(".")
    return positions.get(first, first) + dot + rest


def describe(key: str, prefix: str, numbered: bool) -> str:
    """Return where the tensors are in the checkpoint, in words."""
    parts = [
        f"key {key}" if key else "",
        f"prefix {prefix}" if prefix else "",
        "children by position" if numbered else "",
    ]
    return f" ({', '.join(filter(None, parts))})" if any(parts) else ""


def compare(target: Mapping[str, Tensor], state: Mapping[str, Tensor], total: int, source: str) -> Match:
    """Compare names and shapes. `total` is the number of tensors in the checkpoint's state dict."""
    common = [name for name in target if name in state]
    found = {name: state[name] for name in common if state[name].shape == target[name].shape}
    mismatched = [
        f"{name} ({shape(state[name])} in the file, {shape(target[name])} here)"
        for name in common
        if name not in found
    ]
    missing = [name for name in target if name not in state]
    return Match(found, mismatched, missing, total - len(common), source)


def shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
