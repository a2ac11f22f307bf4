"""Progress of long work: tqdm's bar on a terminal, and a line from time to time in a file or a notebook."""

import sys
from typing import Any

from tqdm import tqdm

FIRST_LINE, LINES = 10.0, 30.0  # seconds to the first line, and between further ones
LINE = "{desc}: {counts} ({percentage:.0f}%), {rate_fmt}, {remaining} left{postfix}"
BAR = "{l_bar}{bar}| {counts} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's, but for the counts


class Bar(tqdm):
    """tqdm whose format may hold {counts}: 8/176, or 1.20k/90.0k."""

    @property
    def format_dict(self) -> Any:
        found = super().format_dict
        counts = (short(found["n"]), "?" if found["total"] is None else short(found["total"]))
        return {**found, "counts": "/".join(counts)}


def short(number: float) -> str:
    """A number of at most four digits, with k or M for larger ones."""
    return f"{number:.0f}" if number < 10_000 else tqdm.format_sizeof(number)


class Lines(Bar):
    """tqdm that writes lines to stderr instead of a bar. Short work writes none."""

    next_line = 0.0

    def __init__(self, *args: Any, **kwargs: Any):
        given = {"mininterval": FIRST_LINE, "miniters": 1, "delay": FIRST_LINE}
        super().__init__(*args, **kwargs | given | {"leave": False})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = self._time()  # type: ignore[attr-defined]
        if msg is None and now >= self.next_line:  # the empty text removes a bar
            self.next_line = now + LINES
            print(self, file=sys.stderr, flush=True)

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: tqdm.write removes bars from its line, and lines stay."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        if not nolock:  # with it, tqdm.write draws the bars again
            super().refresh(lock_args=lock_args)


def progress(*args: Any, hidden: bool = False, rate: str = "rate_fmt", **kwargs: Any) -> tqdm:
    """tqdm(*args, **kwargs): a bar if stderr is a terminal, else lines. `hidden`: nothing.

    `rate` is a field of tqdm's format: rate_fmt changes to seconds per iteration if that exceeds 1.
    """
    kind: Any
    kind, text = (Bar, BAR) if sys.stderr.isatty() else (Lines, LINE)
    return kind(*args, disable=hidden, bar_format=text.replace("rate_fmt", rate), **kwargs)


def image_progress(name: str, total: int, done: int = 0, hidden: bool = False, leave: bool = True) -> tqdm:
    """The progress of work on `total` images, of which `done` are finished."""
    options: Any = {"unit": " images", "unit_scale": True, "hidden": hidden, "leave": leave}
    return progress(desc=name, total=total, initial=done, rate="rate_noinv_fmt", **options)
