"""Read the files of many runs, in any state: running, failed, or killed while writing a line."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError, one_line
from ssl_runner.runs.files import parse_csv, read_json
from ssl_runner.runs.run_json import wrong_fields

Row = dict[str, Any]
MAX_DEPTH, MAX_NODES = 40, 100_000  # of a YAML file or run.json; a run's own have depth 6 and 400 nodes
# What YAML's constructors raise besides YAMLError, for example for `!!bool x`
BROKEN = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError, yaml.YAMLError)
RESERVED = {  # columns of the tables, which an option may not replace
    *("path", "status", "error", "method", "data", "rows", "top1", "val_top1", "configuration", "n", "by"),
    *("epochs_done", "epochs_asked", "wall_seconds", "processes", "device_seconds", "images_per_s"),
}
RESERVED_PREFIXES = ("top1.", "metrics.", "run.", "protocol.", "± ")


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
    problems   one line for each file, or field of run.json, that is not as ssl-run writes it
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
    problems: list[str]

    @property
    def status(self) -> str:
        return self.record.get("status") or "unknown"

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
    hydra, problems = path / ".hydra", list[str]()
    header, rows = read_csv(path / "metrics.csv", problems)
    probe_header, probe_rows = read_csv(path / "probe.csv", problems)
    columns = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    epochs, loss, rate = (
        numbers(columns.get(name, [""] * len(rows))) for name in ("epoch", "loss", "images_per_s")
    )
    overrides = read_yaml(hydra / "overrides.yaml", list, problems)
    return Run(
        path=path,
        record=read_record(path / "run.json", problems),
        config=without_reserved(flatten(read_yaml(hydra / "config.yaml", dict, problems))),
        overrides=without_reserved(dict(split_override(line) for line in overrides if not of_hydra(line))),
        choices=without_reserved(flatten(read_yaml(hydra / "hydra.yaml", dict, problems, choices_of))),
        last=dict(zip(header, map(number, rows[-1]), strict=True)) if rows else {},
        epochs=epochs,
        loss=loss,
        rate=rate,
        probes=[dict(zip(probe_header, map(number, row), strict=True)) for row in probe_rows],
        problems=problems,
    )


def without_reserved(options: dict[str, str]) -> dict[str, str]:
    """The options without those that have the name of another column."""
    return {
        key: value
        for key, value in options.items()
        if key not in RESERVED and not key.startswith(RESERVED_PREFIXES)
    }


def add_problem(problems: list[str], path: Path, expected: str, found: object) -> None:
    """Add a line that names the file, what it should contain and what it contains."""
    text = one_line(found) if isinstance(found, Exception) else repr(found)
    problems.append(f"{printable(path)}: expected {expected}, found {printable(text)[:100]}")


def read_record(path: Path, problems: list[str]) -> Row:
    """run.json, {} if it cannot be read. Fields of a wrong type are left out."""
    try:
        record = clean(read_json(path)) if path.exists() else {}
        refuse_large(record)
    except (OSError, UsageError, ValueError, RecursionError) as error:
        add_problem(problems, path, "the JSON object that ssl-run writes", error.__cause__ or error)
        return {}
    for name, expected in wrong_fields(record).items():
        add_problem(problems, path, f"{expected} as {name}", record.pop(name))
    return record


def read_yaml(
    path: Path, kind: type, problems: list[str], part: Callable[[str], str] = lambda text: text
) -> Any:
    """The content of a YAML file, or of the part of its text: a mapping or list, empty if it is neither.

    libyaml parses it: OmegaConf takes twenty times as long. It refuses bytes that are not UTF-8, which
    OmegaConf writes as "\\uDCFF", so these become escapes.
    """
    try:
        if not path.exists():
            return kind()
        text = part(path.read_text("utf-8"))
        text = re.sub(r"(?<!\\)\\uDC[89A-F][0-9A-F]", lambda found: f"\\{found[0].lower()}", text)
        content = yaml.load(text, yaml.CSafeLoader)
        refuse_large(content)
    except (OSError, *BROKEN) as error:
        add_problem(problems, path, "the YAML that ssl-run writes", error)
        return kind()
    if not isinstance(content, kind):
        add_problem(problems, path, "a list" if kind is list else "keys and values", content)
        return kind()
    return content


def refuse_large(content: Any) -> None:
    """Raise ValueError for a content that is nested too deeply, contains itself or repeats many parts."""
    level, nodes = [content], 0
    for _ in range(MAX_DEPTH):
        nodes += len(level)
        if not level or nodes > MAX_NODES:
            break
        level = [child for node in level for child in children(node)]
    if level:
        raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_NODES:,} entries")


def children(node: Any) -> list[Any]:
    """The entries of a list or the values of a mapping."""
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def clean(node: Any) -> Any:
    """Parsed JSON in which every text can be written: bytes that are not UTF-8 become escapes."""
    if isinstance(node, dict):
        return {clean(key): clean(child) for key, child in node.items()}
    if isinstance(node, list):
        return [clean(child) for child in node]
    return printable(node) if isinstance(node, str) else node


def choices_of(hydra_yaml: str) -> str:
    """The choices of config groups in the text of hydra.yaml. Only these lines are parsed, for speed.

    Raises ValueError if there are none.
    """
    block = re.search(r"^ +choices:\n((?: {6,}.*\n)+)", hydra_yaml, re.MULTILINE)
    if block is None:
        raise ValueError("no choices of config groups")
    return block[1]


def read_spectrum(run: Run) -> np.ndarray:
    """spectrum.csv as an array (rows, 3) of k, Z and closed_form; nan where it has no number."""
    header, rows = read_csv(run.path / "spectrum.csv", run.problems, "k")
    columns = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    missing = [""] * len(rows)
    return np.stack([numbers(columns.get(name, missing)) for name in ("k", "Z", "closed_form")], axis=1)


def read_csv(path: Path, problems: list[str], index: str = "epoch") -> tuple[list[str], list[list[str]]]:
    """The header of a CSV file and its complete rows: those that end with a newline and have every column.

    A file without the column `index` is a problem, and has no rows.
    """
    try:
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        header, rows = parse_csv(text)
    except (OSError, ValueError) as error:
        add_problem(problems, path, "the table that ssl-run writes", error)
        return [], []
    if header and index not in header:
        add_problem(problems, path, f"a column {index}", ",".join(header))
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
