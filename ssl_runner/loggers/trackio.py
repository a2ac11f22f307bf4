"""Trackio: a local dashboard with the interface of wandb."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_runner.loggers.base import LoggedRun, Logger


class Trackio(Logger):
    """One run of a project, in TRACKIO_DIR of this machine. `options`: further arguments of trackio.init."""

    def __init__(self, project: str, **options: Any):
        self.project = project
        self.options = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False} | options

    def start(self, run: LoggedRun) -> str:
        import trackio

        name = f"{run.name} {run.id}"  # trackio finds a run by its name
        self.run = trackio.init(self.project, name, config=run.config, resume="allow", **self.options)
        return f"trackio show --project {self.project}"

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log({**values, "epoch": epoch}, step=epoch)

    def picture(self, name: str, path: Path) -> None:
        import trackio

        self.run.log({name: trackio.Image(path)})

    def finish(self, status: str) -> None:
        self.run.finish()
