"""Optimiser with parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ssl_runner.errors import UsageError, of_part

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
CHOSEN = {"fused", "foreach", "differentiable"}  # keywords that select an implementation


def build(
    modules: Iterable[nn.Module], algorithm: Callable[..., Optimizer], lr: float, weight_decay: float
) -> Optimizer:
    """Return an optimiser over all trainable parameters of the modules.

    1-d parameters (biases, norm layers) get no weight decay and, under LARS, no layer-wise adaptation.
    `always_adapt` affects only timm's LARS, which by default does not adapt parameters without weight decay.

    Adam, AdamW and SGD use their fused implementation (one kernel for many parameters) unless a keyword of
    `algorithm` selects another one. The fused implementation is the fastest, and the only one for which the
    fp16 gradient scaler needs no host-device sync.

    Raises UsageError if the algorithm rejects its arguments.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    kind, keywords = getattr(algorithm, "func", algorithm), getattr(algorithm, "keywords", {})
    fused = {"fused": True} if kind in FUSED and not CHOSEN & keywords.keys() else {}
    try:
        return algorithm([group for group in groups if group["params"]], lr=lr, **fused)
    except (TypeError, ValueError) as error:
        raise UsageError(of_part("optimizer", error)) from error


def learning_rate(
    step: int,
    schedule: Sequence[Mapping[str, int]],
    steps_per_epoch: int,
    warmup_epochs: float,
    lr: float,
    final_ratio: float,
) -> float:
    """Return the learning rate of a step, counted over all epochs.

    Each part of the schedule, from `from_epoch` to `to_epoch`, has a warm-up and a cosine of its own. The
    part that began last applies.
    """
    begun = [part for part in schedule if part["from_epoch"] * steps_per_epoch <= step]
    first, end = (begun[-1][name] * steps_per_epoch for name in ("from_epoch", "to_epoch"))
    return cosine(step - first, end - first, round(warmup_epochs * steps_per_epoch), lr, final_ratio)


def cosine(step: int, steps: int, warmup: int, lr: float, final_ratio: float) -> float:
    """Return the learning rate of a step in 0 .. steps - 1.

    Linear warm-up to lr over the first `warmup` steps, then half a cosine down to final_ratio * lr.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2)
