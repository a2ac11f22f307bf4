"""Fine-tuning: the backbone and a linear classifier trained together on the labels of `train`."""

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_runner import optimizer
from ssl_runner.batch import per_size
from ssl_runner.data.dataset import DataSet
from ssl_runner.device import AUTOCAST_DTYPES, synchronize
from ssl_runner.errors import UsageError
from ssl_runner.model import SSLModel
from ssl_runner.probe.protocol import accuracies, extract
from ssl_runner.probe.shares import LabelDraw
from ssl_runner.progress import progress
from ssl_runner.view_layout import RULES
from ssl_runner.views import Augment, ViewFormat


@dataclass(frozen=True)
class FineTuning:
    """Options: AdamW with a half cosine from `lr` to 0; every image as one view of `policy`.

    An epoch has n // batch_size steps, and at least one; the remaining images are left out.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    policy: dict[str, Any]

    def __post_init__(self) -> None:
        Augment({"all": self.policy})  # raises ValueError for an invalid policy
        for key in RULES.keys() & self.policy.keys():
            raise ValueError(
                f"policy.{key}={self.policy[key]}: expected the operations of a view; leave it out"
            )


def finetune(
    model: SSLModel,
    data: DataSet,
    options: FineTuning,
    draws: Sequence[LabelDraw | None],
    precision: str,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield rows of probe.csv for a network that starts from the backbone of `model`, one per draw and split.

    A copy of the backbone and a linear classifier, which starts at 0, are trained on `train`, or on the draw.
    The epoch with the highest top-1 on `val` is selected (the first of several) and scored once on `test`.
    `model` is not changed. The same seed gives the same rows. `seconds` covers training and evaluation.

    Raises UsageError if the loss is not finite.
    """
    for draw in draws:
        synchronize(data.mean.device)
        start = time.perf_counter()
        positions = torch.arange(len(data.train)) if draw is None else draw.positions
        network = classifier(model, len(data.classes)).to(data.mean.device)
        with torch.random.fork_rng([data.mean.device] if data.mean.device.type == "cuda" else []):
            torch.manual_seed(seed)
            epoch, val_scores = train(network, data, positions, options, precision, seed)
        parts = [("val", val_scores, data.val.y)]
        if len(data.test):
            parts.append(("test", extract(network, data.test, data.mean, data.std), data.test.y))
        for split, scores, y in parts:
            yield {
                "probe": "finetune",
                "features": "backbone",
                "dataset": data.name,
                "train_split": "train",
                "eval_split": split,
                "selection": f"epoch={epoch} (val)",
                "n_train": len(positions),
                **accuracies(scores, y),
                "seconds": time.perf_counter() - start,
                **(draw.columns() if draw is not None else {}),
            }


def classifier(model: SSLModel, classes: int) -> nn.Module:
    """A copy of the backbone followed by a linear layer that is 0: images (N, C, H, W) -> (N, classes)."""
    head = nn.Linear(model.backbone.width, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(deepcopy(model.backbone), nn.Flatten(), head).to(memory_format=model.memory_format)


def train(
    network: nn.Module, data: DataSet, positions: Tensor, options: FineTuning, precision: str, seed: int
) -> tuple[int, Tensor]:
    """Train on `positions` within `train`, and leave the weights of the best epoch in `network`.

    Returns that epoch, counted from 1, and its scores (n, classes) on `val`.
    """
    device, n = data.mean.device, len(positions)
    size = min(options.batch_size, n)
    steps = n // size
    algorithm = optimizer.build([network], torch.optim.AdamW, options.lr, options.weight_decay)
    schedule = partial(
        optimizer.cosine, steps=options.epochs * steps, warmup=0, lr=options.lr, final_ratio=0.0
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    augment, views = Augment({"all": options.policy}), torch.Generator(device).manual_seed(seed)
    shuffle = torch.Generator("cpu").manual_seed(seed)
    best = (-1.0, 0, torch.empty(0), dict[str, Tensor]())
    for epoch in progress(range(options.epochs), "finetune", leave=False):
        order = positions[torch.randperm(n, generator=shuffle)[: steps * size]]
        network.train()
        for number, (images, y) in enumerate(data.train.stored.batches(order, size, device)):
            for group in algorithm.param_groups:
                group["lr"] = schedule(epoch * steps + number)
            [x] = per_size(
                augment(images, 1, data.mean, data.std, views, view_format=ViewFormat(data.view_size))
            )
            loss = step(network, x, y, algorithm, scaler, AUTOCAST_DTYPES[precision])
        if not loss.isfinite():
            raise UsageError(
                f"probe.finetune.lr={options.lr}: the loss is not finite in epoch {epoch + 1};"
                " use a lower learning rate"
            )
        scores = extract(network, data.val, data.mean, data.std)
        top1 = accuracies(scores, data.val.y)["top1"] or 0.0
        if top1 > best[0]:
            best = (top1, epoch + 1, scores, deepcopy(network.state_dict()))
    network.load_state_dict(best[3])
    return best[1], best[2]


def step(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    algorithm: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype | None,
) -> Tensor:
    """One step of cross-entropy on views x (n, C, H, W) with labels y (n,). Returns the loss, a scalar."""
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        logits = network(x)
    loss = F.cross_entropy(logits.float(), y)
    algorithm.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(algorithm)
    scaler.update()
    return loss.detach()
