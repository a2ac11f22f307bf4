"""run.json: what a run is, on what it runs, and how it ended."""

import os
import platform
import shlex
import shutil
import socket
import subprocess
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from ssl_runner import __version__, distributed
from ssl_runner.metrics import read_json, write_json
from ssl_runner.preemption import EXIT, Preempted

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "hydra-core", "omegaconf")


class Record:
    """A context that keeps run.json: `running` on entry, `done` at the end, `preempted` when the run was asked to end, `failed`
    with the error on any other exception. Of several processes the first one writes it.

    A run that goes on adds its wall seconds to those of before, and one to its starts.
    """

    def __init__(self, folder: Path, identity: str):
        self.path = folder / "run.json"
        self.start = time.time()
        before = read_json(self.path) if self.path.exists() else {}
        self.seconds_before = before.get("wall_seconds") or 0.0
        self.content: dict[str, Any] = {
            "status": "running",
            "error": None,
            "identity": identity,
            "starts": before.get("starts", 0) + 1,
            "processes": distributed.size(),
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

    def note(self, **facts: Any) -> None:
        """Adds facts and writes the file."""
        self.content |= facts
        self.content["wall_seconds"] = round(self.seconds_before + time.time() - self.start, 3)
        if distributed.leads():
            write_json(self.path, self.content)

    def lost(self, code: int, message: str) -> None:
        """Closes the record of a run that another process ends: its exit code, and what it said."""
        if code == EXIT:
            self.note(status="preempted")
        else:
            self.note(status="failed", error=message)

    def __enter__(self) -> Self:
        self.note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.note(status="done")
        elif isinstance(error, Preempted):
            self.note(status="preempted")
        else:
            self.note(
                status="failed",
                error=f"{type(error).__name__}: {error}".removesuffix(": "),
                traceback="".join(traceback.format_exception(error)),
            )


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" behind it if it is changed; None outside a checkout or
    without git."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return (
        subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()
        or None
    )
