"""Stop a run whose loss or weights are no longer finite."""

import math
from collections import deque

import torch
from torch import Tensor

from ssl_runner.device import to_host

ADVICE = "lower optimizer.lr, set optimizer.clip_grad_norm or use precision=fp32"


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


class NonFiniteGuard:
    """Stops a run whose loss is not finite, without a host-device sync.

    On CUDA a step's terms are copied to the host asynchronously and checked when they have arrived, one or
    two steps later. Elsewhere they are checked at once, before the weights are updated.
    """

    def __init__(self) -> None:
        self.pending: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self.latest: dict[str, str] = {}  # for the progress bar

    def put(self, step: int, values: dict[str, Tensor]) -> None:
        """Check the loss and terms of a step, now or later. Raises Diverged."""
        self.pending.append((step, list(values), *to_host(torch.stack(list(values.values())))))
        self._check(wait=False)

    def finish(self) -> None:
        """Wait for pending copies and check them. Raises Diverged."""
        self._check(wait=True)

    def _check(self, wait: bool) -> None:
        while self.pending:
            step, names, values, event = self.pending[0]
            if event is not None and wait:
                event.synchronize()
            if event is not None and not event.query():
                return
            self.pending.popleft()
            numbers = dict(zip(names, values.tolist(), strict=True))
            broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
            if broken:
                terms = ", ".join(
                    f"{name}={value}" for name, value in broken.items() if name != "loss" or len(broken) == 1
                )
                raise Diverged(f"the loss is not finite at step {step}: {terms}; {ADVICE}")
            self.latest = {"loss": f"{numbers['loss']:.4g}"}
