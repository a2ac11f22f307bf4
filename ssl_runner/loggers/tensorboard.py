"""TensorBoard: event files in the run folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_runner.loggers.base import LoggedRun, Logger


class TensorBoard(Logger):
    """Writes event files to <run folder>/tensorboard."""

    rewrites = True

    def start(self, run: LoggedRun) -> str:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        # readers drop the points of earlier event files from purge_step on
        self.writer = SummaryWriter(folder, purge_step=None if run.is_new else 0)
        self.writer.add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```")
        return f"tensorboard --logdir {folder}"

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def picture(self, name: str, path: Path) -> None:
        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")

    def finish(self, status: str) -> None:
        self.writer.close()
