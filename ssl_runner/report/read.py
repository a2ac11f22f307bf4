"""What the files of many runs say, whatever state a run is in: running, failed, killed while it wrote a line."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl_runner.errors import UsageError
from ssl_runner.runs.files import read_json

Row = dict[str, Any]


@dataclass
class Run:
    """One run. A file that is missing or cannot be read leaves its fields empty.

    path       the run folder
    record     run.json
    config     every setting of .hydra/config.yaml by its dotted name, as one would write it on the command line
    overrides  those of .hydra/overrides.yaml, by name, without hydra's own
    choices    the choice of every config group
    last       the last whole row of metrics.csv
    epochs, loss, rate    its columns epoch, loss and images_per_s, each (rows,)
    probes     the whole rows of probe.csv
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


def read_runs(folders: Sequence[Path], without: Path) -> list[Run]:
    """Every run in and below the folders, once each, but for what lies in `without`, a folder below them. UsageError when there is
    none."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give folders that runs lie below, such as outputs")
    paths = {path.resolve(): path for folder in folders for path in find(folder, without.resolve())}
    if not paths:
        raise UsageError(
            f"no run lies below {', '.join(map(str, folders))}: give folders that ssl-run wrote to, such as outputs"
        )
    return [read_run(path) for path in sorted(paths.values(), key=natural)]


def find(folder: Path, without: Path) -> Iterator[Path]:
    """The folders that hold a run.json or a .hydra, this one and below."""
    for place, folders, files in os.walk(folder):
        path = Path(place)
        if path != folder and path.resolve() == without:
            folders.clear()
            continue
        if "run.json" in files or ".hydra" in folders:
            yield path
        folders[:] = [name for name in folders if not name.startswith(".")]


def natural(path: Path) -> list[tuple[int, str]]:
    """A sort key by which job 2 comes before job 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read_run(path: Path) -> Run:
    hydra = path / ".hydra"
    header, rows = read_csv(path / "metrics.csv")
    probe_header, probe_rows = read_csv(path / "probe.csv")
    columns = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    epochs, loss, rate = (
        numbers(columns.get(name, [""] * len(rows))) for name in ("epoch", "loss", "images_per_s")
    )
    overrides = read_yaml(hydra / "overrides.yaml")
    return Run(
        path=path,
        record=read_record(path / "run.json"),
        config=flat(read_yaml(hydra / "config.yaml")),
        overrides=dict(split(line) for line in overrides if not hydras(line))
        if isinstance(overrides, list)
        else {},
        choices=read_choices(hydra / "hydra.yaml"),
        last=dict(zip(header, map(number, rows[-1]), strict=True)) if rows else {},
        epochs=epochs,
        loss=loss,
        rate=rate,
        probes=[dict(zip(probe_header, map(number, row), strict=True)) for row in probe_rows],
    )


def read_record(path: Path) -> Row:
    """run.json, or nothing."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, or nothing."""
    try:
        return yaml.load(path.read_text(), yaml.CSafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def read_choices(path: Path) -> dict[str, str]:
    """The config groups' choices from Hydra's own settings, of which only these lines are parsed."""
    try:
        block = re.search(r"^ +choices:\n((?: {6,}.*\n)+)", path.read_text(), re.MULTILINE)
        choices = yaml.load(block[1], yaml.CSafeLoader) if block else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(group): format_value(choice) for group, choice in choices.items()}


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """A table's header and its whole rows: a line counts once its end is written."""
    try:
        text = path.read_text(errors="replace")
        header, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
    except (OSError, csv.Error):
        return [], []
    return header, [row for row in rows if len(row) == len(header)]


def number(text: str) -> float | str | None:
    """A cell as a number where it is one, None where it is empty."""
    try:
        return float(text)
    except ValueError:
        return text or None


def numbers(cells: Sequence[str]) -> np.ndarray:
    """Cells as floats; nan where one is no number."""
    return np.array(
        [value if isinstance(value := number(cell), float) else np.nan for cell in cells], dtype=float
    )


def flat(node: Any, path: str = "") -> dict[str, str]:
    """Nested settings by their dotted names. Lists are values; what is no mapping at the root is nothing."""
    if not isinstance(node, dict):
        return {path: format_value(node)} if path else {}
    return {
        name: value
        for key, child in node.items()
        for name, value in flat(child, f"{path}.{key}" if path else str(key)).items()
    }


def format_value(value: Any) -> str:
    """A value as one would write it on the command line, the same for 25 and 25.0."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{format_value(child)}' for key, child in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


def hydras(line: Any) -> bool:
    """Whether an override is one of Hydra's own settings, such as the run folder."""
    return str(line).lstrip("+~").startswith(("hydra.", "hydra/"))


def split(line: Any) -> tuple[str, str]:
    """`+optimizer.lr=0.3` -> its key and its value; a deleted key (`~key`) has the value `deleted`."""
    key, _, value = str(line).partition("=")
    return key.lstrip("+~"), "deleted" if key.startswith("~") else value
