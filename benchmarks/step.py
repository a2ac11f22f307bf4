"""A whole training step beside the bare forward and backward of its network: what views, relation, loss, optimiser and the watch
on the loss add. lightly's step as its examples write it, torch.compile and bf16 stand beside."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightly.loss
import numpy as np
import torch
from hydra.utils import instantiate
from lightly.models.modules.heads import BarlowTwinsProjectionHead, SimCLRProjectionHead, VICRegProjectionHead
from lightly.transforms import SimCLRTransform, VICRegTransform
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks import measure, pictures
from benchmarks.measure import Work
from ssl_runner import backbone, optimizer, projector
from ssl_runner.batch import Batch
from ssl_runner.config.compose import CONF
from ssl_runner.data import dataset
from ssl_runner.data.dataset import Source
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
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
    """A real run's parts on images in memory, and its steps one by one."""

    def __init__(self, name: str, loss: str, device: torch.device, precision: str = "fp32"):
        torch.manual_seed(0)
        n = 4 * BATCH
        images = torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8)
        rows = np.arange(n)
        source = Source(
            images, torch.arange(n) % 10, [*"0123456789"], rows[: 3 * BATCH], rows[3 * BATCH :], rows[:0]
        )
        data = dataset.load(lambda: source, "noise", 0.1, None, 0, "auto", device)
        body: Any = BACKBONES[name](3, SIDE)
        body.to(device, memory_format=torch.channels_last)
        head = projector.mlp(body.width, WIDTH, 2, K).to(device)
        self.training = Pretraining(
            body,
            head,
            LOSSES[loss](),
            optimizer.build([body, head], torch.optim.AdamW, 1e-3, 1e-2),
            lambda step: 1e-3,
            data,
            instantiate(OmegaConf.load(CONF / "views" / f"{VIEWS[loss]}.yaml")),
            FromViews(),
            V=V,
            epochs=1,
            batch_size=BATCH,
            clip=None,
            precision=precision,
            channels_last=True,
            separate=False,
            seed=0,
        )
        self.watch, self.batches = NonFiniteGuard(device), self._batches()
        self.X = self.views(*next(self.batches))
        self.Z = torch.randn(V * BATCH, K, device=device)

    def _batches(self) -> Iterator[tuple[Tensor, Batch]]:
        while True:
            yield from self.training._batches(
                torch.randperm(len(self.training.data.pretrain))[: 2 * BATCH].view(2, BATCH)
            )

    def step(self) -> None:
        """One step as a run takes it, from the gathering of the batch on."""
        self.training._step(*next(self.batches), 1e-3, self.watch)

    def forward(self) -> Tensor:
        training = self.training
        with torch.autocast(training.device.type, training.dtype, enabled=training.dtype is not None):
            return training.network(self.X)

    def bare(self) -> None:
        """Forward and backward of the network on an X that is there already."""
        for parameter in self.training.parameters():
            parameter.grad = None
        self.forward().float().square().mean().backward()

    # --- the parts of a step that are not the network's -----------------------------------------------------------------------

    def views(self, images: Tensor, batch: Batch) -> Tensor:
        training, data = self.training, self.training.data
        X = training.augment(images, V, data.mean, data.std, training.view_generator)
        return X.contiguous(memory_format=training.memory_format)

    def lose(self) -> dict[str, Tensor]:
        training = self.training
        Z = self.Z.requires_grad_()
        terms = training._terms(Z, Batch(torch.arange(BATCH), self.labels, V, 10))
        torch.autograd.grad(training.loss.total(terms), Z)
        return {name: value.detach() for name, value in terms.items()}

    def parts(self) -> dict[str, Work]:
        _, batch = next(self.batches)
        self.labels = batch.labels
        self.bare()
        terms = self.lose() | {"loss": torch.zeros((), device=self.training.device)}
        return {
            "ours: batch and views": lambda: self.views(*next(self.batches)),
            "ours: G and loss": self.lose,
            "ours: optimizer": self.training.optimizer.step,
            "ours: watch": lambda: self.watch.put(0, terms),
        }


class Lightly:
    """lightly's training loop, as its examples write it: transforms in a DataLoader of two workers, one forward a view, SGD."""

    def __init__(self, name: str, loss: str, device: torch.device):
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
        self.batches = pictures.forever(pictures.loader(noise, transform, BATCH, workers=2))

    def step(self) -> None:
        first, second = (view.to(self.device) for view in next(self.batches))
        loss = self.criterion(self.network(first), self.network(second))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # its examples add the losses up as numbers


def compiled(ours: Ours) -> float:
    """Compiles the network as compile=true does; the seconds of the first step."""
    ours.training.network.compile(dynamic=False)
    return measure.seconds(ours.step, ours.training.device)


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    return [row for name, loss in product(BACKBONES, LOSSES) for row in compare(name, loss, device, full)]


def compare(name: str, loss: str, device: torch.device, full: bool) -> list[dict[str, Any]]:
    """Rows of one network and loss. ResNet-18, which takes seconds a step on a CPU, is compared with all others for VICReg only,
    unless `full`."""
    quick = name == "convnet" or device.type != "cpu"
    ours = Ours(name, loss, device)
    peak = {"ours: whole step": measure.peak_memory(ours.step, device)}
    contenders: dict[str, Work] = {"bare forward and backward": ours.bare, "ours: whole step": ours.step}
    if quick or full or loss == "VICReg":
        lightlys = Lightly(name, loss, device)
        peak["lightly: whole step"] = measure.peak_memory(lightlys.step, device)
        contenders["lightly: whole step"] = lightlys.step
    compile_seconds = None
    if loss == "VICReg":
        half = Ours(name, loss, device, "bf16")
        contenders |= {"bf16: bare forward and backward": half.bare, "bf16: ours, whole step": half.step}
        if quick or full:
            faster = Ours(name, loss, device)
            compile_seconds = compiled(faster)
            contenders["compile=true: ours, whole step"] = faster.step
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
            "ratio": seconds / times["ours: whole step"],
            "overhead": overhead(tool),
            "compile_s": compile_seconds if tool.startswith("compile") else None,
            "peak_mib": peak.get(tool),
        }
        for tool, seconds in times.items()
    ]
