"""The optimiser's parameter groups and its learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ssl_runner.errors import Refused

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
CHOSEN = {"fused", "foreach", "differentiable"}  # settings that choose another form


def build(
    modules: Iterable[nn.Module], algorithm: Callable[..., Optimizer], lr: float, weight_decay: float
) -> Optimizer:
    """An optimiser over all parameters; 1-d ones (biases, norms) are neither decayed nor, under LARS, adapted. Refused for
    settings that the algorithm does not take.

    `always_adapt` is read by timm's LARS alone, which would else leave out whatever is not decayed.

    Adam, AdamW and SGD take their fused form, one kernel for many parameters, where the settings say nothing else: it is the
    quickest, and the only one for which fp16's scaler does not make the host wait.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    kind, settings = getattr(algorithm, "func", algorithm), getattr(algorithm, "keywords", {})
    fused = {"fused": True} if kind in FUSED and not CHOSEN & settings.keys() else {}
    try:
        return algorithm([group for group in groups if group["params"]], lr=lr, **fused)
    except (TypeError, ValueError) as error:
        raise Refused(f"optimizer: {error}") from error


def cosine(step: int, steps: int, warmup: int, lr: float, final: float) -> float:
    """The learning rate of step 0 .. steps - 1: linear over the first `warmup` steps, then a half cosine down to final * lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
