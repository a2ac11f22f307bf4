"""Training step compared with the bare forward and backward pass of its network.

The difference is the overhead of views, relation, loss, optimiser and the check for non-finite losses.
lightly's training step (as in its examples), torch.compile and bf16 are timed as well.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks import measure, pil_loader
from benchmarks.measure import Work
from ssl_runner import backbone, optimizer, projector
from ssl_runner.batch import Batch, ViewTensors, per_size
from ssl_runner.config.compose import CONF
from ssl_runner.data import dataset
from ssl_runner.data.dataset import Source
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.model import SSLModel
from ssl_runner.relation.builders import FromViews
from ssl_runner.train import NonFiniteGuard, Pretraining

BATCH, V, SIDE, WIDTH, K = 256, 2, 32, 512, 256
LOSSES: dict[str, Callable[[], Loss]] = {"VICReg": VICReg, "SimCLR": SimCLR, "Barlow Twins": BarlowTwins}
VIEWS = {"VICReg": "vicreg", "SimCLR": "simclr", "Barlow Twins": "barlow"}
BACKBONES: dict[str, Callable[..., backbone.Backbone]] = {
    "convnet": backbone.convnet,
    "resnet18": partial(backbone.resnet, name="resnet18"),
}


class Ours:
    """The components of a run on random images in memory, with methods for whole steps and their parts."""

    def __init__(self, name: str, loss: str, device: torch.device, precision: str = "fp32"):
        torch.manual_seed(0)
        n = 4 * BATCH
        images = torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8)
        rows = np.arange(n)
        source = Source(
            images, torch.arange(n) % 10, [*"0123456789"], rows[: 3 * BATCH], rows[3 * BATCH :], rows[:0]
        )
        data = dataset.load(lambda: source, "noise", 0.1, None, 0, "auto", device)
        model = SSLModel(body := BACKBONES[name](3, SIDE), projector.mlp(body.width, WIDTH, 2, K), True)
        model.to(device)
        body.to(memory_format=torch.channels_last)
        augment = instantiate(OmegaConf.load(CONF / "views" / f"{VIEWS[loss]}.yaml"))
        self.loader = MultiViewLoader(data, augment, V=V, batch_size=BATCH, seed=0)
        self.training = Pretraining(
            model,
            LOSSES[loss](),
            self.loader,
            FromViews(),
            optimizer=optimizer.build([model], torch.optim.AdamW, 1e-3, 1e-2),
            learning_rate=lambda step: 1e-3,
            precision=precision,
        )
        self.guard, self.batches = NonFiniteGuard(), self._batches()
        X, self.batch = next(self.batches)
        [X] = per_size(X)
        self.X = X.contiguous(memory_format=model.memory_format)
        self.Z = torch.randn(V * BATCH, K, device=device)

    def _batches(self) -> Iterator[tuple[ViewTensors, Batch]]:
        while True:
            yield from self.loader.batches(0)

    def step(self) -> None:
        """One training step, including the loading of the batch and its views."""
        self.training._step(*next(self.batches), self.guard)

    def forward(self) -> Tensor:
        """Forward pass of the network on fixed views, under autocast if the precision requires it."""
        training = self.training
        with torch.autocast(training.device.type, training.dtype, enabled=training.dtype is not None):
            return training.network(self.X)

    def bare(self) -> None:
        """Forward and backward pass of the network on fixed views."""
        for parameter in self.training.parameters():
            parameter.grad = None
        self.forward().float().square().mean().backward()

    # --- parts of a step other than the network ---

    def loss_gradient(self) -> dict[str, Tensor]:
        """Relation, loss and gradient with respect to a fixed Z. Returns the terms of the loss."""
        training = self.training
        Z = self.Z.requires_grad_()
        terms = training._terms(Z, self.batch)
        torch.autograd.grad(training.loss.total(terms), Z)
        return {name: value.detach() for name, value in terms.items()}

    def parts(self) -> dict[str, Work]:
        """Return the parts of a step, each as a function to time."""
        self.bare()
        terms = self.loss_gradient() | {"loss": torch.zeros((), device=self.training.device)}
        return {
            "ssl_runner: batch and views": lambda: next(self.batches),
            "ssl_runner: G and loss": self.loss_gradient,
            "ssl_runner: optimizer": self.training.optimizer.step,
            "ssl_runner: non-finite guard": lambda: self.guard.put(0, terms),
        }


class Lightly:
    """lightly's training loop, as in its examples.

    It uses transforms in a DataLoader with two workers, one forward pass per view, and SGD.
    """

    def __init__(self, name: str, loss: str, device: torch.device):
        import lightly.loss
        from lightly.models.modules.heads import (
            BarlowTwinsProjectionHead,
            SimCLRProjectionHead,
            VICRegProjectionHead,
        )
        from lightly.transforms import SimCLRTransform, VICRegTransform
        from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

        torch.manual_seed(0)
        body = BACKBONES[name](3, SIDE)
        byol = BYOLTransform(BYOLView1Transform(input_size=SIDE), BYOLView2Transform(input_size=SIDE))
        transform, head, criterion = {
            "VICReg": lambda: (
                VICRegTransform(input_size=SIDE),
                VICRegProjectionHead(body.width, WIDTH, K, 2),
                "VICRegLoss",
            ),
            "SimCLR": lambda: (
                SimCLRTransform(input_size=SIDE),
                SimCLRProjectionHead(body.width, WIDTH, K),
                "NTXentLoss",
            ),
            "Barlow Twins": lambda: (
                byol,
                BarlowTwinsProjectionHead(body.width, WIDTH, K),
                "BarlowTwinsLoss",
            ),
        }[loss]()
        self.device, self.criterion = device, getattr(lightly.loss, criterion)()
        self.network = nn.Sequential(body, head).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.06)
        noise = np.random.default_rng(0).integers(0, 256, (2 * BATCH, SIDE, SIDE, 3), dtype=np.uint8)
        self.batches = pil_loader.forever(pil_loader.loader(noise, transform, BATCH, workers=2))

    def step(self) -> None:
        """One training step, including the loading of the batch."""
        first, second = (view.to(self.device) for view in next(self.batches))
        loss = self.criterion(self.network(first), self.network(second))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # the examples accumulate the loss as a number


def compiled(ours: Ours) -> float:
    """Compile the network as `compile=true` does. Returns the time of the first step (s)."""
    ours.training.network.compile(dynamic=False)
    return measure.seconds(ours.step, ours.training.device)


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per network, loss and contender; see `compare`."""
    return [row for name, loss in product(BACKBONES, LOSSES) for row in compare(name, loss, device, full)]


def compare(name: str, loss: str, device: torch.device, full: bool) -> list[dict[str, Any]]:
    """One row per contender: work, tool, ms, ratio, overhead, compile_s, peak_mib.

    `ratio` is the time divided by that of our whole step; `overhead` is the time in excess of the bare
    forward and backward pass, as a fraction. On a CPU, where ResNet-18 takes seconds per step, it is compared
    with all contenders for VICReg only, unless `full`.
    """
    quick = name == "convnet" or device.type != "cpu"
    ours = Ours(name, loss, device)
    peak = {"ssl_runner: whole step": measure.peak_memory(ours.step, device)}
    contenders: dict[str, Work] = {
        "bare forward and backward": ours.bare,
        "ssl_runner: whole step": ours.step,
    }
    if quick or full or loss == "VICReg":
        lightlys = Lightly(name, loss, device)
        peak["lightly: whole step"] = measure.peak_memory(lightlys.step, device)
        contenders["lightly: whole step"] = lightlys.step
    compile_seconds = None
    if loss == "VICReg":
        half = Ours(name, loss, device, "bf16")
        contenders |= {
            "bf16: bare forward and backward": half.bare,
            "bf16: ssl_runner, whole step": half.step,
        }
        if quick or full:
            faster = Ours(name, loss, device)
            compile_seconds = compiled(faster)
            contenders["compile=true: ssl_runner, whole step"] = faster.step
    budget, least = (10.0, 5) if quick else (0.0, 5 if full else 3)
    times = measure.interleaved(contenders, device, budget, least)
    times |= measure.interleaved(ours.parts(), device, budget=2.0)

    def overhead(tool: str) -> float | None:
        bare = "bf16: bare forward and backward" if tool.startswith("bf16") else "bare forward and backward"
        return times[tool] / times[bare] - 1 if "whole step" in tool else None

    return [
        {
            "work": f"{name} batch {BATCH} {loss}",
            "tool": tool,
            "ms": 1000 * seconds,
            "ratio": seconds / times["ssl_runner: whole step"],
            "overhead": overhead(tool),
            "compile_s": compile_seconds if tool.startswith("compile") else None,
            "peak_mib": peak.get(tool),
        }
        for tool, seconds in times.items()
    ]
