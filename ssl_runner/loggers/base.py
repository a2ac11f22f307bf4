"""Base class of the loggers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISH_SECONDS = 30.0  # how long the end of a run waits for its logger


@dataclass(frozen=True)
class LoggedRun:
    """The facts about a run that a logger shows."""

    id: str  # kept in run.json, so that a resumed run continues its curve
    is_new: bool  # whether no earlier start of the run had a logger
    folder: Path
    config: dict[str, Any]  # nested and resolved

    @property
    def name(self) -> str:
        """The last three parts of the folder, such as mnist5k/vicreg/2026-11-25_18-55-58-43d1d5be."""
        return "/".join(self.folder.absolute().parts[-3:])


class Logger:
    """One run in a program that shows curves.

    Every method is called in one thread of its own, in the main process. The first exception turns the logger
    off; the run continues. The library is imported in `start`.
    """

    rewrites = False  # `start` of a resumed run discards its curve, and all rows are logged again

    def start(self, run: LoggedRun) -> str:
        """Begin a run, or continue that with the id of an earlier start. Returns where to find it."""
        raise NotImplementedError

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Add one point, at `epoch`, to the curves named in `values`."""
        raise NotImplementedError

    def picture(self, name: str, path: Path) -> None:
        """Add a PNG file."""
        raise NotImplementedError

    def finish(self, status: str) -> None:
        """End the run, or this start of it. `status` is done, failed or preempted."""
        raise NotImplementedError
