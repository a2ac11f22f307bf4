"""Rows of gpu-check: written one by one, so that a section that is stopped keeps those it has."""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLUMNS = {  # key of a row -> heading and format of a column
    "section": ("section", "{}"),
    "what": ("what", "{}"),
    "ms": ("ms", "{:.3g}"),
    "images_per_s": ("images/s", "{:,.0f}"),
    "epoch_s": ("s per 50,000 images", "{:.2f}"),
    "gib": ("GiB", "{:.2f}"),
    "kernels": ("kernels", "{:.0f}"),
    "idle": ("idle", "{:.0%}"),
    "note": ("note", "{}"),
}


@dataclass(frozen=True)
class Section:
    """Where a section of gpu-check runs, and the file that it adds rows to.

    On a CPU the work of every section is `tiny`: it shows that the section works, and measures nothing.
    """

    name: str
    device: torch.device
    folder: Path

    @property
    def tiny(self) -> bool:
        return self.device.type == "cpu"

    def row(self, what: str, failed: bool = False, **figures: Any) -> None:
        """Add a row. `figures` have the keys of COLUMNS; None leaves a cell empty."""
        line = {"section": self.name, "what": what, "failed": failed, **figures}
        with open(self.folder / "rows.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def attempt(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        """Add the row that `work` returns. If it raises, the row has the error, and the section goes on."""
        try:
            self.row(what, **work())
        except Exception as error:  # whatever it is, it is the result of this row
            traceback.print_exc()
            self.row(what, failed=True, note=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows that the sections have written so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table in Markdown, without the columns that are empty in all rows. Failed rows say so."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [[COLUMNS[key][0] for key in keys], ["---"] * len(keys)]
    lines += [[cell(row, key) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cell(row: dict[str, Any], key: str) -> str:
    """Text of one cell, without characters that end a cell."""
    value = row.get(key)
    text = "" if value is None else COLUMNS[key][1].format(value)
    if key == "note" and row["failed"]:
        text = f"**failed**: {text}"
    return text.replace("|", "\\|").replace("\n", " ")
