"""Data, models and commands that several test files share."""

import csv
import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_runner import optimizer
from ssl_runner.backbone import convnet
from ssl_runner.data import dataset
from ssl_runner.data.dataset import DataSet, Source
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.evaluator import Columns, Evaluator
from ssl_runner.loss import Loss, VICReg
from ssl_runner.model import SSLModel
from ssl_runner.projector import mlp
from ssl_runner.relation import Relation
from ssl_runner.relation.builders import FromViews, RelationBuilder
from ssl_runner.solver import Solver
from ssl_runner.train import NonFiniteGuard, Pretraining
from ssl_runner.views import Augment

CPU = torch.device("cpu")
TIMINGS = (
    *("seconds", "seconds_views", "seconds_step", "seconds_checkpoint", "seconds_evaluators"),
    *("images_per_s", "diagnostics_s", "solve_s", "cached"),
)
TINY = (
    "epochs=2 dataset.subset=200 batch_size=50 backbone.widths=[8,16] projector.width=16 projector.K=8"
    " probe.probes=[knn] probe.features=[backbone] device=cpu precision=fp32"
    " embedding.method=none"
)


TWO_SIZES = {  # 2 views of 8 x 8 pixels, and 3 of the size of the images
    "large": {"count": 2, "size": 8, "crop": {"scale": [0.4, 1.0]}, "flip": 0.5},
    "small": {"count": 3, "crop": {"scale": [0.2, 0.4]}, "solarize": {"p": 0.5, "threshold": 0.5}},
}


def toy(per_class: int = 20, classes: int = 4, unlabeled: int = 0, side: int = 4) -> Source:
    """Return a data set with 8 test images. The first pixel of every image equals its index."""
    n = per_class * classes
    total = n + 8 + unlabeled
    images = torch.zeros(total, 3, side, side, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(total)
    labels = torch.cat([torch.arange(n + 8) % classes, torch.full((unlabeled,), -1)])
    rows = np.arange(total)
    return Source(images, labels, [str(c) for c in range(classes)], rows[:n], rows[n : n + 8], rows[n + 8 :])


def load(
    data: Source,
    val_fraction: float = 0.25,
    subset: int | None = None,
    split_seed: int = 0,
    storage: str = "auto",
    device: torch.device = CPU,
) -> DataSet:
    """Return the splits of `data`."""
    return dataset.load(lambda: data, "toy", val_fraction, subset, split_seed, storage, device)


def noise_loader(
    augment: Augment | None = None,
    *,
    V: int = 2,
    batch_size: int = 20,
    epochs: int = 1,
    seed: int = 0,
    resolutions: Sequence[int | None] = (None,),
    storage: str = "auto",
    device: torch.device = CPU,
) -> MultiViewLoader:
    """Return a loader of the toy data set with random pixels: 60 images to pretrain on, 4 x 4 pixels."""
    source = toy()
    generator = torch.Generator().manual_seed(0)
    source.images = torch.randint(0, 256, source.images.shape, generator=generator, dtype=torch.uint8)
    return MultiViewLoader(
        load(source, storage=storage, device=device),
        augment or Augment({"all": {"crop": {"scale": [0.3, 1.0]}, "flip": 0.5}}),
        V=V,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        resolutions=resolutions,
    )


def pretraining(
    loss: Loss | None = None,
    relation: RelationBuilder | None = None,
    epochs: int = 3,
    precision: str = "fp32",
    clip_grad_norm: float | None = None,
    lr: float = 1e-2,
    V: int = 2,
    augment: Augment | None = None,
    per_view: bool = False,
    dropout: float = 0.0,
    storage: str = "auto",
    device: torch.device = CPU,
) -> Pretraining:
    """Return the training of a small model on `noise_loader`: 3 steps of 20 images per epoch."""
    loader = noise_loader(augment, V=V, epochs=epochs, storage=storage, device=device)
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Dropout(dropout), mlp(8, 8, 2, 5))
    model = SSLModel(convnet(3, 4, [4, 8]), projector, channels_last=True).to(device)
    return Pretraining(
        model,
        loss or VICReg(),
        loader,
        relation or FromViews(),
        optimizer=optimizer.build([model], torch.optim.AdamW, lr, 1e-2),
        learning_rate=partial(optimizer.cosine, steps=epochs * 3, warmup=2, lr=lr, final_ratio=0.0),
        precision=precision,
        clip_grad_norm=clip_grad_norm,
        per_view=per_view,
    )


class NormInBackground(Evaluator):
    """The norm of the backbone's first parameter, computed slowly in the background."""

    columns = ("norm",)

    def __init__(self, loader: Any, relation: Any, loss: Any, folder: Path, seconds: float = 0.005):
        super().__init__()
        self.seconds = seconds

    def evaluate(self, model: SSLModel, epoch: int) -> Callable[[], Columns]:
        first = next(model.backbone.parameters()).detach().clone()

        def columns() -> Columns:
            time.sleep(self.seconds)
            return {"norm": float(first.norm())}

        return columns


def is_defined(loss: Loss, G: Relation) -> bool:
    """Whether the loss accepts the relation."""
    try:
        loss.check_relation(G)
    except ValueError:
        return False
    return True


def rows(solver: Solver) -> list[dict[str, Any]]:
    """Run the remaining epochs. Returns the rows of metrics.csv without timings."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in solver.epochs()]


def weights(solver: Solver) -> dict[str, Tensor]:
    """Parameters and buffers of the solver's model."""
    return solver.model.state_dict()


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, without timings."""
    with open(path, newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in TIMINGS}
            for row in csv.DictReader(file)
        ]


def complete_rows(path: Path) -> pd.DataFrame:
    """The complete lines of a CSV file that may still be written to."""
    text = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return pd.read_csv(io.StringIO(text)) if text else pd.DataFrame()


def start(command: str, cwd: Path, save_interval: float = 60.0) -> subprocess.Popen:
    """Start `ssl-run` with this command line in a process of its own. `save_interval` (s): of checkpoints."""
    code = f"from ssl_runner import cli, train; train.SAVE_INTERVAL = {save_interval}; cli.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *command.split()],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(
    main: Callable[[], None],
    words: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str, str]:
    """Run a console script in this process. Returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, *capsys.readouterr()


def run_folder(out: str) -> Path:
    """Return the run folder given by `run=` in the last line of standard output."""
    return Path(out.strip().splitlines()[-1].partition("run=")[2])


def raising(error: BaseException | None) -> Callable[..., Any]:
    """A function that raises an error, or receives SIGTERM for None."""

    def call(*args: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGTERM) if error is None else None
        raise error or AssertionError

    return call


def preempt_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make a training in this process receive SIGTERM in its `step`-th step, counted from 1."""
    put = NonFiniteGuard.put

    def put_and_preempt(self: NonFiniteGuard, number: int, values: dict[str, Tensor]) -> None:
        put(self, number, values)
        if number == step - 1:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(NonFiniteGuard, "put", put_and_preempt)


def make_pictures(root: Path, train: int, test: int, side: int) -> None:
    """Write side x side noise images of two brightnesses to root/{train,test}/{dark,light}.

    `train` and `test` are the numbers of images per class.
    """
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", train), ("test", test)):
        for c, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(
                    100 * c, 100 * c + 100, (side, side, 3), generator=generator, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
