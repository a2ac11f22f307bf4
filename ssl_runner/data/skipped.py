"""Files of a data set that are not read: how many of each kind, and their names."""

from collections import Counter
from os import PathLike, fspath
from typing import Any

from ssl_runner.errors import counted

MOST_NAMES, MOST_KINDS = 100, 10


class Skipped:
    """Counts of skipped files by kind, such as ".txt" or "hidden", and the first 100 names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: list[str] = []

    def add(self, kind: str, path: str | PathLike[str]) -> None:
        self.counts[kind] += 1
        if len(self.names) < MOST_NAMES:
            self.names.append(printable(path))

    def record(self) -> dict[str, Any]:
        """The field of run.json."""
        return {"counts": self.most_common(), "files": self.names}

    def most_common(self) -> dict[str, int]:
        """The counts of the 10 most frequent kinds, and of all others together."""
        counts = dict(self.counts.most_common(MOST_KINDS))
        others = self.counts.total() - sum(counts.values())
        return counts | ({"of other kinds": others} if others else {})

    def __str__(self) -> str:
        """One line, or "" if no file was skipped."""
        total = self.counts.total()
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.most_common().items())
        return f"skipped {counted(total, 'file')}: {kinds}" if total else ""


def printable(path: str | PathLike[str]) -> str:
    """A path as text that every encoding can write: bytes that are not UTF-8 become escapes."""
    return fspath(path).encode("utf-8", "backslashreplace").decode()
