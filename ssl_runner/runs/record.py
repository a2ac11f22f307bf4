"""run.json: the command, environment and status of a run."""

import os
import platform
import shlex
import socket
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from omegaconf import DictConfig, ListConfig

from ssl_runner import __version__, distributed
from ssl_runner.preemption import EXIT, Preempted
from ssl_runner.runs.files import write_json
from ssl_runner.runs.run_json import read_record
from ssl_runner.version import git_commit

# of an earlier start: until the data set has been read and compared, and what a resume does again
KEPT = ("data_digest", "images", "compile", "loggers", "tags", "note")
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "hydra-core", "omegaconf")


def names(cfg: DictConfig) -> dict[str, object]:
    """Fields of run.json that name the run, as far as they are given: the list `tags`, and `note`."""
    tags = cfg.tags if isinstance(cfg.tags, ListConfig) else [cfg.tags]
    named: dict[str, object] = {} if cfg.tags is None else {"tags": [str(tag) for tag in tags]}
    return named if cfg.note is None else named | {"note": str(cfg.note)}


class RunRecord:
    """Context manager that maintains run.json. Only rank 0 writes the file.

    `status` is `running` until the exit, then `done`. It is `preempted` after a Preempted exception, and
    `failed`, with error and traceback, after any other exception. If a run with `abandon` ends before `begin`
    is called, `abandon` removes its files instead.

    `facts` are further fields. When a run resumes, `wall_seconds` (s) continues from its previous value and
    `starts` increases by one.
    """

    def __init__(self, folder: Path, identity: str, abandon: Callable[[], None] | None = None, **facts: Any):
        self.path = folder / "run.json"
        self.start, self.lock = time.time(), threading.Lock()
        self.abandon, self.abandoned = abandon, False
        before = read_record(self.path) if self.path.exists() else {}
        self.seconds_before = before.get("wall_seconds") or 0.0
        kept = {"tags": [], "note": None} | {name: before[name] for name in KEPT if name in before}
        self.content: dict[str, Any] = (
            kept
            | {
                "status": "running",
                "error": None,
                "identity": identity,
                "starts": (before.get("starts") or 0) + 1,
                "processes": distributed.world_size(),
                "wall_seconds": self.seconds_before,
                "started": before.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": shlex.join(psutil.Process().cmdline()),
                "cwd": str(Path.cwd()),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_started": psutil.Process().create_time(),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
                "git_commit": git_commit(),
                "versions": {
                    "ssl_runner": __version__,
                    "python": platform.python_version(),
                    **{name: version(name) for name in LIBRARIES},
                },
            }
            | facts
        )

    def begin(self) -> None:
        """Note that training begins: from now on the record stays."""
        self.abandon = None

    def update(self, **facts: Any) -> None:
        """Add or update fields, then write the file. May be called from any thread."""
        with self.lock:
            self.content |= facts
            self.content["wall_seconds"] = round(self.seconds_before + time.time() - self.start, 3)
            if distributed.is_main_process() and not self.abandoned:
                write_json(self.path, self.content)

    def fail(self, code: int, message: str) -> None:
        """Record that another rank ended the run, given its exit code and error message."""
        self._abandon_unless_begun()
        if code == EXIT:
            self.update(status="preempted")
        else:
            self.update(status="failed", error=message)

    def _abandon_unless_begun(self) -> None:
        """Call `abandon`, once, if the run has not begun. Then `update` writes nothing any more."""
        with self.lock:
            if self.abandon is not None:
                self.abandoned, abandon, self.abandon = True, self.abandon, None
                abandon()

    def __enter__(self) -> Self:
        self.update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon_unless_begun()
        if error is None:
            try:
                self.update(status="done")
            except Preempted:  # a signal while the file was written; the run is done
                self.update(status="done")
                raise
        elif isinstance(error, Preempted):
            self.update(status="preempted")
        else:
            self.update(
                status="failed",
                error=f"{type(error).__name__}: {error}".removesuffix(": "),
                traceback="".join(traceback.format_exception(error)),
            )
