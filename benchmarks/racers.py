"""One racer of the race: python -m benchmarks.racers '{"tool": …}' trains a network for so many seconds, then says what its
features are worth. Every tool has the same images in memory, the same backbone and batch size; all else is its own.

The clock runs while training only: not for imports, nor for reading the images, nor for keeping a copy of the weights at a
mark, which is probed after the end.
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
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import pictures
from ssl_runner import build, optimizer
from ssl_runner.backbone import convnet
from ssl_runner.config import compose
from ssl_runner.data.dataset import DataSet
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.probe.protocol import evaluate

BATCH = 256
WARMUP = 0.05  # of the time, in our schedule by the clock


class Clock:
    """Seconds of training, of which `budget` are allowed; at every mark it stops for a copy of the backbone's weights."""

    def __init__(self, budget: float, marks: list[float]):
        self.budget, self.marks, self.images = budget, sorted(marks), 0
        self.backbone: nn.Module = nn.Identity()
        self.kept: list[tuple[float, int, dict[str, Tensor]]] = []
        self.start = 0.0

    def tick(self) -> float:
        """Called before each step: the seconds that are over. The first call starts the clock."""
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
        """Keeps the weights as they are now, whatever the time."""
        self.marks = [0.0]
        self.tick()

    @property
    def over(self) -> bool:
        return not self.marks


def settings(given: dict[str, Any]) -> DictConfig:
    """The configuration of ours: the defaults for these images and this loss."""
    compose.register_resolvers()
    compose.prefer_our_presets()
    overrides = [
        "dataset=folder",
        f"dataset.root={given['data']}",
        f"loss={given['loss']}",
        f"seed={given['seed']}",
    ]
    overrides += [f"device={given['device']}", f"batch_size={BATCH}"]
    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def ours(given: dict[str, Any], clock: Clock) -> tuple[nn.Module, DataSet]:
    """A run as `ssl-run` makes it, but that the learning rate follows the clock instead of the number of steps, or the
    number of images where that is given."""
    cfg, images = settings(given), given.get("images")
    stages = build.build(cfg)
    clock.backbone = stages.backbone
    preemption = Preemption()
    solver: Any = runner.build_solver(cfg, stages, preemption, lambda state: None)
    schedule = partial(
        optimizer.cosine,
        steps=1000,
        warmup=int(1000 * WARMUP),
        lr=cfg.optimizer.lr,
        final=cfg.optimizer.final_lr,
    )

    def by_the_clock(step: int) -> float:
        clock.images = step * BATCH
        elapsed = clock.tick()
        progress = clock.images / images if images else elapsed / clock.budget
        if progress >= 1 and not clock.over:
            clock.end()
        if clock.over:
            preemption.asked = signal.SIGTERM  # ends the run after this step
        return schedule(min(999, int(1000 * progress)))

    solver.learning_rate = by_the_clock
    solver.total_epochs = 10**6
    with suppress(Preempted):
        for _ in solver.epochs():
            pass
    return stages.backbone, stages.data


def loader(data: DataSet, transform: Callable, workers: int) -> DataLoader:
    """The pretraining images as the peers load them."""
    return pictures.loader(
        data.pretrain.images[data.pretrain.indices].permute(0, 2, 3, 1).cpu().numpy(),
        transform,
        BATCH,
        workers,
    )


def lightly(given: dict[str, Any], clock: Clock) -> tuple[nn.Module, DataSet]:
    """The plain training loops of lightly's examples for CIFAR-10: its transforms, heads and losses, SGD at 0.06."""
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
    for views in pictures.forever(loader(data, transform, given["workers"])):
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
    """stable-pretraining's Module under Lightning's Trainer: its transforms, its losses, a projector, LARS and a warmed-up cosine
    as in its documentation; the schedule is as long as the steps that the time allows."""
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
    if not clock.over:  # the schedule has ended before the time
        clock.end()
    return backbone.to(device), data


def peers_start(given: dict[str, Any]) -> tuple[DataSet, torch.device, Any]:
    """What the peers share with ours: the images and the backbone."""
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
    rows = []
    for elapsed, images, weights in clock.kept:
        backbone.load_state_dict(weights)
        top1 = {
            row["probe"]: row["top1"]
            for row in evaluate("backbone", backbone, data, ["linear", "knn"], score_test=True)
        }
        rows.append({"seconds": elapsed, "images": images, "linear": top1["linear"], "knn": top1["knn"]})
    Path(given["out"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
