"""The identity of a run: the options that can change its result. No Hydra, no torch."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

# options and groups that change no result
NO_RESULT = ("logger", "tags", "note", "profile", "dataset.cache", "probe.cache")


def run_id(config: DictConfig) -> str:
    """Return the SHA-256 of the options that can change a result, resolved, which identifies a run.

    The seed is included. Ints and floats compare equal, so 7 and 7.0 give the same digest.
    """
    content: Any = OmegaConf.to_container(config, resolve=True)
    del content["resume"]
    for key in NO_RESULT:
        group, _, name = key.rpartition(".")
        (content.get(group, {}) if group else content).pop(name, None)
    numbers = json.loads(json.dumps(content), parse_int=float)
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def compared(content: Any) -> dict[str, Any]:
    """Return the values of a resolved configuration, as nested dicts, that `run_id` identifies a run by."""
    pairs = dict(leaves(content))
    return {key: value for key, value in pairs.items() if changes_result(key)}


def changes_result(key: str) -> bool:
    """Return whether an option, given by its dotted key, can change the result of a run."""
    return not any(key == name or key.startswith(f"{name}.") for name in ("resume", *NO_RESULT))


def leaves(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and values of nested dicts."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
