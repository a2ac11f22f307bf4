"""The optimiser's parameter groups and its learning-rate schedule."""

import math
from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer


def build(modules: Iterable[nn.Module], algorithm: Callable[..., Optimizer], lr: float, weight_decay: float) -> Optimizer:
    """An optimiser over all parameters; 1-d ones (biases, norms) are neither decayed nor, under LARS, adapted."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return algorithm([group for group in groups if group["params"]], lr=lr)


def cosine(step: int, steps: int, warmup: int, lr: float, final: float) -> float:
    """The learning rate of step 0 .. steps - 1: linear over the first `warmup` steps, then a half cosine down to final * lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
