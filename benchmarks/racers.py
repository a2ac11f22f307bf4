"""Child process of the race: `python -m benchmarks.racers '{"tool": ...}'` trains and probes one network.

All tools use the same images in memory and the same batch size, and the same backbone unless `experiment`
sets that of ssl_runner. Everything else is their own. The clock runs only during training. Imports, reading
of images and copying of weights do not count. At each mark the weights are copied; the copies are probed
after training.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import pil_loader
from ssl_runner import build, optimizer
from ssl_runner.backbone import convnet
from ssl_runner.config import arguments, check
from ssl_runner.config.compose import prefer_our_presets, register_resolvers
from ssl_runner.config.paths import quote
from ssl_runner.data.dataset import DataSet
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.probe import KnnProbe, LinearProbe, evaluate

BATCH = 256
PROBES = {"linear": LinearProbe, "knn": KnnProbe}
WARMUP = 0.05  # fraction of the training time, in our time-based schedule


class Clock:
    """Training time in seconds. At each mark the clock is paused while the backbone's weights are copied.

    budget   allowed training time (s)
    marks    remaining times (s) at which the weights are copied
    images   number of images processed so far
    kept     copies as (elapsed seconds, images, state_dict)
    """

    def __init__(self, budget: float, marks: list[float]):
        self.budget, self.marks, self.images = budget, sorted(marks), 0
        self.backbone: nn.Module = nn.Identity()
        self.kept: list[tuple[float, int, dict[str, Tensor]]] = []
        self.start = 0.0

    def tick(self) -> float:
        """Return the elapsed seconds. Call before each step; the first call starts the clock."""
        self.start = self.start or time.perf_counter()
        elapsed = time.perf_counter() - self.start
        if self.marks and elapsed >= self.marks[0]:
            self.marks.pop(0)
            self.kept.append(
                (
                    elapsed,
                    self.images,
                    {name: value.clone() for name, value in self.backbone.state_dict().items()},
                )
            )
            self.start = time.perf_counter() - elapsed
        return elapsed

    def end(self) -> None:
        """Copy the current weights and end the training, regardless of the time."""
        self.marks = [0.0]
        self.tick()

    @property
    def over(self) -> bool:
        """Whether all marks have been reached."""
        return not self.marks


def settings(given: dict[str, Any]) -> DictConfig:
    """Compose the configuration of ssl_runner for the given images and loss: defaults, or an experiment.

    The sweep of an experiment is left out. Raises UsageError for a configuration that `ssl-run` refuses.
    """
    register_resolvers()
    prefer_our_presets()
    overrides = [
        "dataset=folder",
        f"dataset.root={quote(Path(given['data']))}",
        *(f"{key}={given[key]}" for key in ("loss", "seed", "device")),
        f"batch_size={BATCH}",
    ]
    if given.get("experiment"):
        overrides.append(f"experiment={given['experiment']}")
    [(_, config)] = check.check(arguments.parse(arguments.parser(), overrides))
    return config


def ours(given: dict[str, Any], clock: Clock) -> tuple[nn.Module, DataSet]:
    """Train as `ssl-run` does, but with a learning rate that follows the clock instead of the step.

    If `images` is given, the learning rate follows the number of images processed.
    """
    cfg, images = settings(given), given.get("images")
    experiment = build.build(cfg)
    backbone = clock.backbone = experiment.model.backbone
    preemption = Preemption()
    solver: Any = experiment.solver(preemption, lambda state, how: None)
    schedule = partial(
        optimizer.cosine,
        steps=1000,
        warmup=int(1000 * WARMUP),
        lr=cfg.optimizer.lr,
        final_ratio=cfg.optimizer.final_lr_ratio,
    )

    def by_the_clock(step: int) -> float:
        clock.images = step * BATCH
        elapsed = clock.tick()
        progress = clock.images / images if images else elapsed / clock.budget
        if progress >= 1 and not clock.over:
            clock.end()
        if clock.over:
            preemption.received = signal.SIGTERM  # ends the run after this step
        return schedule(min(999, int(1000 * progress)))

    solver.learning_rate = by_the_clock
    solver.total_epochs = 10**6
    with suppress(Preempted):
        for _ in solver.epochs():
            pass
    return backbone, experiment.data


def loader(data: DataSet, transform: Callable, workers: int) -> DataLoader:
    """Data loader over the pretraining images, as in the peers' examples."""
    return pil_loader.loader(
        data.pretrain.images[data.pretrain.indices].permute(0, 2, 3, 1).cpu().numpy(),
        transform,
        BATCH,
        workers,
    )


def lightly(given: dict[str, Any], clock: Clock) -> tuple[nn.Module, DataSet]:
    """Train as in lightly's CIFAR-10 examples: its transforms, heads and losses, SGD with lr 0.06."""
    from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
    from lightly.models.modules import heads
    from lightly.transforms import BYOLTransform, SimCLRTransform, VICRegTransform
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    data, device, backbone = peers_start(given)
    transform, head, loss = {
        "simclr": lambda: (
            SimCLRTransform(input_size=32, gaussian_blur=0.0),
            heads.SimCLRProjectionHead(backbone.width, 512, 128),
            NTXentLoss(),
        ),
        "vicreg": lambda: (
            VICRegTransform(input_size=32),
            heads.VICRegProjectionHead(backbone.width, 2048, 2048),
            VICRegLoss(),
        ),
        "barlow": lambda: (
            BYOLTransform(
                BYOLView1Transform(input_size=32, gaussian_blur=0.0),
                BYOLView2Transform(input_size=32, gaussian_blur=0.0),
            ),
            heads.BarlowTwinsProjectionHead(backbone.width, 2048, 2048),
            BarlowTwinsLoss(),
        ),
    }[given["loss"]]()
    head = head.to(device)
    sgd = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    clock.backbone = backbone
    for views in pil_loader.forever(loader(data, transform, given["workers"])):
        clock.tick()
        if clock.over:
            return backbone, data
        z0, z1 = (head(backbone(x.to(device))) for x in views[:2])
        loss(z0, z1).backward()
        sgd.step()
        sgd.zero_grad()
        clock.images += BATCH
    raise AssertionError


def stable_pretraining(given: dict[str, Any], clock: Clock) -> tuple[nn.Module, DataSet]:
    """Train stable-pretraining's Module with Lightning's Trainer.

    Transforms, losses, projector, LARS and the cosine schedule with warm-up are those of its documentation.
    The schedule has budget x `steps_per_s` steps.
    """
    import lightning
    import stable_pretraining as spt
    from stable_pretraining import forward
    from stable_pretraining.data import transforms

    data, device, backbone = peers_start(given)
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((32, 32), scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToImage(mean=data.mean.tolist(), std=data.std.tolist()),
    )
    several = transforms.MultiViewTransform([view, view])
    loss = {
        "simclr": {"simclr_loss": spt.losses.NTXEntLoss(temperature=0.5)},
        "vicreg": {"vicreg_loss": spt.losses.VICRegLoss()},
        "barlow": {"barlow_loss": spt.losses.BarlowTwinsLoss()},
    }[given["loss"]]
    wide = 2048

    def hidden(width: int) -> list[nn.Module]:
        return [nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.ReLU(inplace=True)]

    module = spt.Module(
        forward={"simclr": forward.simclr, "vicreg": forward.vicreg, "barlow": forward.barlow_twins}[
            given["loss"]
        ],
        backbone=backbone,
        projector=nn.Sequential(*hidden(backbone.width), *hidden(wide), nn.Linear(wide, 256)),
        optim={
            "optimizer": {"type": "LARS", "lr": 5.0, "weight_decay": 1e-6},
            "scheduler": {"type": "LinearWarmupCosineAnnealing"},
            "interval": "step",
        },
        **loss,
    )

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            clock.tick()
            trainer.should_stop = clock.over

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int
        ) -> None:
            clock.images += BATCH

    clock.backbone = backbone
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=max(1, int(clock.budget * given["steps_per_s"])),
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
    )
    trainer.fit(module, loader(data, lambda image: several({"image": image}), given["workers"]))
    if not clock.over:  # the schedule ended before the budget was used up
        clock.end()
    return backbone.to(device), data


def peers_start(given: dict[str, Any]) -> tuple[DataSet, torch.device, Any]:
    """Return what all tools share: data set, device and backbone."""
    cfg = settings(given)
    data = build.build(cfg).data
    device = torch.device(given["device"])
    torch.manual_seed(given["seed"])
    return data, device, convnet(3, 32).to(device)


def main() -> None:
    given = json.loads(sys.argv[1])
    clock = Clock(given["seconds"], given["marks"])
    backbone, data = {"ours": ours, "lightly": lightly, "stable-pretraining": stable_pretraining}[
        given["tool"]
    ](given, clock)
    V = settings(given).V if given["tool"] == "ours" else 2
    rows = []
    for elapsed, images, weights in clock.kept:
        backbone.load_state_dict(weights)
        top1 = {
            row["probe"]: row["top1"] for row in evaluate("backbone", backbone, data, PROBES, score_test=True)
        }
        rows.append({"seconds": elapsed, "images": images, "V": V} | {name: top1[name] for name in PROBES})
    Path(given["out"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
