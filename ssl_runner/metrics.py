"""The files that a run writes as it goes: CSV tables that survive a crash and a resume, and run.json."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Table:
    """A CSV file whose columns are those of its first row. Each row is on disk when `append` returns. Without a path the table is
    kept nowhere: of several processes one writes."""

    def __init__(self, path: Path | None):
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
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

    def keep(self, epoch: int) -> None:
        """Drops the rows after `epoch`, and a torn last line: what a crash left behind that a resumed run will write again."""
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
    """Writes JSON atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    return json.loads(path.read_text())
