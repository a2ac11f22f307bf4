"""Crash-safe files of a run: append-only CSV tables, and JSON."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CsvLog:
    """CSV file to which rows are appended. The first row determines the columns.

    With path=None nothing is written, as needed on all ranks but 0.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row. It is on disk (fsync) when this method returns."""
        if self.path is None:
            return
        new = not self.path.exists() or self.path.stat().st_size == 0
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(row)
            writer.writerow(row.values())
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, epoch: int) -> None:
        """Drop all rows after `epoch`, and an incomplete last line left by a crash.

        A resumed run writes these rows again.
        """
        if self.path is None or not self.path.exists():
            return
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        header, *rows = list(csv.reader(whole.splitlines())) or [[]]
        kept = [row for row in rows if int(row[header.index("epoch")]) <= epoch]
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *kept] if header else [])
        os.replace(partial, self.path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file written by `write_json`."""
    return json.loads(path.read_text())
