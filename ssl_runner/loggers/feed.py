"""Passes the rows of the CSV files to a logger, without waiting for it and without being ended by it."""

import csv
import secrets
import sys
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ssl_runner.errors import format_error
from ssl_runner.loggers.base import FINISH_SECONDS, LoggedRun, Logger
from ssl_runner.preemption import Preempted

TABLES = ("metrics", "probe")  # the CSV files of a run
PICTURES = ("views", "embedding", "neighbors")  # PNG files of a finished run
EARLY_SECONDS = 5.0  # instead of FINISH_SECONDS, for a run that ends early: Slurm kills it soon


class Feed:
    """Context manager with one daemon thread that calls the logger of a run, if it has one.

    The thread starts with `start`. A logger that raises is turned off, with one line on stderr. The exit
    waits for its last calls, FINISH_SECONDS at most.
    """

    def __init__(self) -> None:
        self.logger, self.name = Logger(), ""  # replaced by `start`
        self.jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.thread = Thread(target=self._work, name="logger", daemon=True)
        self.folder, self.warned = Path(), False

    def start(self, logger: Logger, folder: Path, cfg: DictConfig, ids: Mapping[str, str]) -> dict[str, str]:
        """Start the logger. The rows that the CSV files have already are logged if the logger lacks them.

        `ids` are those of the run, by logger. Returns them with that of this logger.
        """
        self.logger, self.name, self.folder = logger, type(logger).__name__.lower(), folder
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        run = LoggedRun(ids.get(self.name) or secrets.token_hex(8), self.name not in ids, folder, config)
        self.jobs.put(partial(self._start, run))
        if run.is_new or self.logger.rewrites:
            for table in TABLES:
                for row in read_rows(folder / f"{table}.csv"):
                    self.jobs.put(partial(self._log, table, row))
        self.thread.start()
        return {**ids, self.name: run.id}

    def listener(self, table: str) -> Callable[[Mapping[str, Any]], None]:
        """The function to call with every row of a table, in any thread."""
        return lambda row: self._put(self._log, table, dict(row))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.thread.is_alive():
            return
        status = "done" if error is None else "preempted" if isinstance(error, Preempted) else "failed"
        if status == "done":
            for path in (self.folder / f"{name}.png" for name in PICTURES):
                if path.exists():
                    self._put(self.logger.picture, path.stem, path)
        self._put(self.logger.finish, status)
        self.jobs.put(None)
        seconds = FINISH_SECONDS if status == "done" else EARLY_SECONDS
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._warn(f"did not finish within {seconds:g} s")

    def _put(self, job: Callable[..., object], *arguments: Any) -> None:
        if self.thread.is_alive():
            self.jobs.put(partial(job, *arguments))

    def _work(self) -> None:
        try:
            for job in iter(self.jobs.get, None):
                job()
        except BaseException as error:  # any error of a library, SystemExit included
            self._warn(f"failed and is off: {format_error(error)}")

    def _start(self, run: LoggedRun) -> None:
        tqdm.write(f"logger: {self.logger.start(run)}")

    def _log(self, table: str, row: Mapping[str, Any]) -> None:
        if found := values(table, row):
            self.logger.log(found, int(row["epoch"]))

    def _warn(self, message: str) -> None:
        """Print one line for a run: no second one if a logger fails after it was waited for."""
        if not self.warned:
            self.warned = True
            tqdm.write(f"logger {self.name} {message}; metrics.csv and probe.csv have every row", sys.stderr)


def values(table: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The points of a row by the names of their curves.

    These are all numbers of metrics.csv, by column, and top1 and top5 of probe.csv, as
    probe/<split>/<features>/<probe>/top1. A probe on a share of the labels is a curve of its own.
    """
    numbers = {name: float(value) for name, value in row.items() if is_number(value)}
    if table == "metrics":
        return {name: value for name, value in numbers.items() if name != "epoch"}
    parts = [table, row["eval_split"], row["features"], row["probe"]]
    parts += [f"{name}-{numbers[name]:g}" for name in ("label_share", "draw") if name in numbers]
    return {"/".join([*parts, name]): numbers[name] for name in ("top1", "top5") if name in numbers}


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file with numbers as float, [] if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: to_number(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def to_number(cell: str) -> float | str:
    """A cell as a number if it is one."""
    try:
        return float(cell)
    except ValueError:
        return cell
