"""Read the files of many runs, in any state: running, failed, or killed while writing a line."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.runs.files import parse_csv, read_json

Row = dict[str, Any]


@dataclass
class Run:
    """One run. Fields are empty where a file is missing or cannot be read.

    path       the run folder
    record     run.json
    config     .hydra/config.yaml as dotted key -> value in command-line syntax
    overrides  .hydra/overrides.yaml as key -> value, without Hydra's own keys
    choices    config group -> choice
    last       the last complete row of metrics.csv
    epochs, loss, rate    its columns epoch, loss and images_per_s, each (rows,)
    probes     the complete rows of probe.csv
    """

    path: Path
    record: Row
    config: dict[str, str]
    overrides: dict[str, str]
    choices: dict[str, str]
    last: Row
    epochs: np.ndarray
    loss: np.ndarray
    rate: np.ndarray
    probes: list[Row]

    @property
    def status(self) -> str:
        return str(self.record.get("status") or "unknown")

    @property
    def tags(self) -> list[str]:
        tags = self.record.get("tags")
        return list(map(str, tags)) if isinstance(tags, list) else []


def read_runs(folders: Sequence[Path], without: Path) -> list[Run]:
    """Every run in and below the folders, once each, except those in `without`.

    Raises UsageError if there is none.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: expected a folder; give folders that contain runs, such as outputs")
    paths = {path.resolve(): path for folder in folders for path in find_runs(folder, without.resolve())}
    if not paths:
        given = ", ".join(map(printable, folders))
        raise UsageError(
            f"{given}: expected runs, found none; give folders that ssl-run wrote to, such as outputs"
        )
    return [read_run(path) for path in sorted(paths.values(), key=natural)]


def find_runs(folder: Path, without: Path) -> Iterator[Path]:
    """The folders, this one and below, that contain a run.json or a .hydra."""
    for name, folders, files in os.walk(folder):
        path = Path(name)
        if path != folder and path.resolve() == without:
            folders.clear()
            continue
        if "run.json" in files or ".hydra" in folders:
            yield path
        folders[:] = [name for name in folders if not name.startswith(".")]


def natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts job 2 before job 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read_run(path: Path) -> Run:
    hydra = path / ".hydra"
    header, rows = read_csv(path / "metrics.csv")
    probe_header, probe_rows = read_csv(path / "probe.csv")
    columns = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    epochs, loss, rate = (
        numbers(columns.get(name, [""] * len(rows))) for name in ("epoch", "loss", "images_per_s")
    )
    overrides = read_yaml(text_of(hydra / "overrides.yaml"))
    task_overrides = [line for line in overrides if not of_hydra(line)] if isinstance(overrides, list) else []
    return Run(
        path=path,
        record=read_record(path / "run.json"),
        config=flatten(read_yaml(text_of(hydra / "config.yaml"))),
        overrides=dict(split_override(line) for line in task_overrides),
        choices=read_choices(text_of(hydra / "hydra.yaml")),
        last=dict(zip(header, map(number, rows[-1]), strict=True)) if rows else {},
        epochs=epochs,
        loss=loss,
        rate=rate,
        probes=[dict(zip(probe_header, map(number, row), strict=True)) for row in probe_rows],
    )


def text_of(path: Path) -> str:
    """The text of a file, "" if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def read_record(path: Path) -> Row:
    """run.json, {} if it cannot be read."""
    try:
        record = read_json(path)
    except (OSError, UsageError):
        return {}
    return clean(record) if isinstance(record, dict) else {}


def read_yaml(text: str) -> Any:
    """The content of a YAML file, None if it is empty or damaged.

    libyaml parses it: OmegaConf takes twenty times as long. It refuses bytes that are not UTF-8, which
    OmegaConf writes as "\\uDCFF", so these become escapes.
    """
    text = re.sub(r"(?<!\\)\\uDC[89A-F][0-9A-F]", lambda found: f"\\{found[0].lower()}", text)
    try:
        return yaml.load(text, yaml.CSafeLoader)
    except (ValueError, yaml.YAMLError):
        return None


def clean(node: Any) -> Any:
    """Parsed JSON in which every text can be written: bytes that are not UTF-8 become escapes."""
    if isinstance(node, dict):
        return {clean(key): clean(child) for key, child in node.items()}
    if isinstance(node, list):
        return [clean(child) for child in node]
    return printable(node) if isinstance(node, str) else node


def read_choices(hydra_yaml: str) -> dict[str, str]:
    """The choices of config groups, from hydra.yaml. Only the lines concerned are parsed, for speed."""
    block = re.search(r"^ +choices:\n((?: {6,}.*\n)+)", hydra_yaml, re.MULTILINE)
    return flatten(read_yaml(block[1])) if block else {}


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header of a CSV file and its complete rows: those that end with a newline and have every column."""
    try:
        header, rows = parse_csv(path.read_bytes().decode(errors="replace"))
    except (OSError, csv.Error):
        return [], []
    return header, [row for row in rows if len(row) == len(header)]


def number(text: str) -> float | str | None:
    """A cell as a number if it is one, None if it is empty."""
    try:
        return float(text)
    except ValueError:
        return text or None


def numbers(cells: Sequence[str]) -> np.ndarray:
    """Cells as floats, nan for those that are not numbers."""
    values = map(number, cells)
    return np.array([value if isinstance(value, float) else np.nan for value in values], dtype=float)


def flatten(node: Any, path: str = "") -> dict[str, str]:
    """Nested options as dotted key -> value. A list is a value; without a mapping at the root, none."""
    if not isinstance(node, dict):
        return {path: canonical_value(node)} if path else {}
    children = ((f"{path}.{key}" if path else str(key), child) for key, child in node.items())
    return {key: value for name, child in children for key, value in flatten(child, name).items()}


def canonical_value(value: Any) -> str:
    """A value as text that is equal for equal values: 25 and 25.0 give the same."""
    if isinstance(value, list):
        return f"[{','.join(map(canonical_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{canonical_value(child)}' for key, child in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


def of_hydra(line: Any) -> bool:
    """Whether an override sets one of Hydra's own options, such as the run folder."""
    return str(line).lstrip("+~").startswith(("hydra.", "hydra/"))


def split_override(line: Any) -> tuple[str, str]:
    """`+optimizer.lr=0.3` -> its key and value. The value of a deleted key (`~key`) is `deleted`."""
    key, _, value = str(line).partition("=")
    return key.lstrip("+~"), "deleted" if key.startswith("~") else value
