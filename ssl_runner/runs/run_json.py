"""Read run.json: the fields that other modules use, and their types."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_runner.errors import UsageError
from ssl_runner.runs.files import read_json

REQUIRED = ("status", "identity", "cwd", "host", "pid", "process_started")  # in every run, null in none


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """Whether a value is a finite number of a size that occurs, not a boolean."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) < 1e15 and math.isfinite(value)  # type: ignore[arg-type]


def is_count(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 1


def is_accuracy(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]


def is_object(value: object) -> bool:
    return isinstance(value, dict)


def is_schedule(value: object) -> bool:
    """Whether a value is a list of {"from_epoch": a, "to_epoch": b}."""
    parts = value if isinstance(value, list) else [None]
    return all(
        isinstance(part, dict) and all(isinstance(part.get(key), int) for key in ("from_epoch", "to_epoch"))
        for part in parts
    )


FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {  # name -> what is expected, and its check
    **dict.fromkeys(("status", "identity", "cwd", "host", "error", "traceback"), ("text", is_text)),
    **dict.fromkeys(("started", "git_commit"), ("text", is_text)),
    **dict.fromkeys(("process_started", "wall_seconds", "loss"), ("a number", is_number)),
    **dict.fromkeys(("pid", "starts", "processes"), ("an integer >= 1", is_count)),
    **dict.fromkeys(("top1", "val_top1"), ("a number in [0, 1]", is_accuracy)),
    **dict.fromkeys(("images", "relation", "loggers"), ("an object", is_object)),
    "schedule": ("a list of from_epoch and to_epoch", is_schedule),
}


def wrong_fields(record: dict[str, Any]) -> dict[str, str]:
    """Name -> what is expected, for every field of another type than in FIELDS. null is of every type."""
    return {
        name: expected
        for name, (expected, accepts) in FIELDS.items()
        if record.get(name) is not None and not accepts(record[name])
    }


def read_record(path: Path) -> dict[str, Any]:
    """Read run.json. Raises UsageError if it is damaged, lacks a field or has one of another type."""
    record = read_json(path)
    wrong = {name: FIELDS[name][0] for name in REQUIRED if record.get(name) is None} | wrong_fields(record)
    for name, expected in wrong.items():
        raise UsageError(
            f"{path}: expected {expected} as {name}, found {record.get(name)!r:.80}; restore the file, or"
            " start a new run in another folder"
        )
    return record
