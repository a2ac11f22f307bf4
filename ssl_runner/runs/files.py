"""Crash-safe files: atomic writes, append-only CSV tables, and JSON."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ssl_runner.errors import UsageError, counted, one_line


@contextmanager
def atomic_write(path: Path, concurrent: bool = False) -> Iterator[BinaryIO]:
    """Context manager that replaces `path` by what is written to the binary file it yields.

    The file appears under its name when the body ends, after an fsync, so neither a reader nor a crash sees a
    part of it. If the body raises, `path` stays as it was. With `concurrent`, several processes may write the
    same path at once: the last one wins.
    """
    partial = path.with_name(f"{path.name}{f'.{os.getpid()}' if concurrent else ''}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


FORMER_COLUMNS = {  # of metrics.csv in runs of earlier versions
    "loss_floor": "optimum_loss",
    "floor_kind": "optimum_kind",
    "optimal_rank": "optimum_rank",
    "moments_floor": "moments_closed_form",
    "moments_floor_kind": "moments_closed_form_kind",
}


class CsvLog:
    """CSV file to which rows are appended. The first row determines the order of the columns.

    A row with new columns extends the header: the file is rewritten, with empty cells in the earlier rows.

    With path=None nothing is written, as needed on all ranks but 0. `listener` is called with every row that
    has been appended; it must not raise.
    """

    def __init__(self, path: Path | None, listener: Callable[[Mapping[str, Any]], None] | None = None):
        self.path, self.listener = path, listener

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row. It is on disk (fsync) when this method returns."""
        if self.path is None:
            return
        header = self._header()
        columns = [*header, *(name for name in row if name not in header)]
        if header and columns != header:
            _, rows = self._read()
            self._write(columns, [cells + [""] * (len(columns) - len(cells)) for cells in rows])
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not header:
                writer.writerow(columns)
            writer.writerow([row.get(name) for name in columns])
            file.flush()
            os.fsync(file.fileno())
        if self.listener is not None:
            self.listener(row)

    def truncate_after(self, epoch: float) -> None:
        """Drop all rows after `epoch`, and an incomplete last line left by a crash.

        A resumed run writes these rows again. Raises UsageError if the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return
        header, rows = self._read()
        with self._damaged():
            for column in positions(header, ["epoch"]):
                for line, row in enumerate(rows, start=2):
                    if not row[column].isdecimal():
                        found = f"found {row[column]!r:.80}"
                        raise ValueError(f"line {line}: expected an integer in the column epoch, {found}")
                rows = [row for row in rows if int(row[column]) <= epoch]
        self._write(header, rows)

    def truncate_at_repeat(self, columns: Sequence[str]) -> None:
        """Drop the first row whose values in `columns` are those of an earlier row, and all rows after it."""
        if self.path is None or not self.path.exists():
            return
        header, rows = self._read()
        with self._damaged():
            chosen = positions(header, columns)
        seen: set[tuple[str, ...]] = set()
        for number, row in enumerate(rows):
            key = tuple(row[position] for position in chosen)
            if key in seen:
                self._write(header, rows[:number])
                return
            seen.add(key)

    def _header(self) -> list[str]:
        """The columns of the file, [] if it does not exist or is empty."""
        if self.path is None or not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return renamed(next(csv.reader(file), []))

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """The header and the cells of all complete lines. Raises UsageError if the file is damaged."""
        with self._damaged():
            header, rows = parse_csv(decoded(self.path.read_bytes()) if self.path is not None else "")
            for line, row in enumerate(rows, start=2):
                if len(row) > len(header):
                    raise ValueError(
                        f"line {line}: expected {counted(len(header), 'column')}, found {len(row)}"
                    )
            return header, [row + [""] * (len(header) - len(row)) for row in rows]

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        """Turn the errors of a file that is not a table with the expected columns into a UsageError."""
        try:
            yield
        except (ValueError, IsADirectoryError) as error:
            problem = "found a folder" if isinstance(error, IsADirectoryError) else one_line(error)
            raise UsageError(
                f"{self.path}: expected the table that ssl-run writes ({problem}); restore it, or remove it"
                " to resume without its rows"
            ) from error

    def _write(self, header: list[str], rows: list[list[str]]) -> None:
        """Replace the file atomically."""
        lines = io.StringIO(newline="")
        csv.writer(lines, lineterminator="\n").writerows([header, *rows] if header else [])
        if self.path is not None:
            with atomic_write(self.path) as file:
                file.write(lines.getvalue().encode())


def parse_csv(text: str) -> tuple[list[str], list[list[str]]]:
    """The header of a table and the cells of all lines that end with a newline. Raises ValueError."""
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    try:
        header, *rows = list(reader) or [[]]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: expected shorter cells") from error
    return renamed(header), rows


def decoded(content: bytes) -> str:
    """The text of a file in UTF-8. Raises ValueError with the line of the first other byte."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: expected text in UTF-8, found other bytes") from error


def positions(header: list[str], columns: Sequence[str]) -> list[int]:
    """The positions of these columns in a header. Raises ValueError for one that a header lacks, unless that
    is empty."""
    if header and (missing := [column for column in columns if column not in header]):
        found = ", ".join(header) or "none"
        raise ValueError(f"line 1: expected the column {missing[0]}, found the columns {found:.80}")
    return [header.index(column) for column in columns if header]


def renamed(header: list[str]) -> list[str]:
    """The names of columns in this version."""
    return [FORMER_COLUMNS.get(name, name) for name in header]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file written by `write_json`. Raises UsageError if it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"found {content!r:.80}")
    except (OSError, ValueError, RecursionError) as error:
        problem = one_line(error)
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}, column {error.colno}: found no JSON"
            problem = where if error.doc.strip() else "found an empty file"
        raise UsageError(
            f"{path}: expected a JSON object ({problem}); it is damaged, restore or remove it"
        ) from error
    return content
