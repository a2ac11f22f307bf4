"""Weights & Biases, online or offline."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_runner.loggers.base import FINISH_SECONDS, LoggedRun, Logger


class Wandb(Logger):
    """One run of a project. Its local files are in <run folder>/wandb.

    mode       "online", "offline" or None for the setting of wandb (WANDB_MODE)
    options    further arguments of wandb.init, such as `entity`
    """

    def __init__(self, project: str, mode: str | None = None, **options: Any):
        self.mode, self.options = mode, {"project": project, "mode": mode} | options

    def start(self, run: LoggedRun) -> str:
        import wandb

        mode = self.mode or os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False):
            raise ValueError("no API key: run wandb login, or use logger.mode=offline")
        self.run = wandb.init(
            id=run.id,
            name=run.name,
            config=run.config,
            dir=run.folder,
            resume="allow",
            reinit="create_new",  # jobs of a sweep run in one process
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
            **self.options,
        )
        self.run.define_metric("*", step_metric="epoch")
        files = Path(self.run.dir).parent
        return f"wandb sync {files}" if self.run.offline else str(self.run.url)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log({**values, "epoch": epoch})

    def picture(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def finish(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "done" else 1)
