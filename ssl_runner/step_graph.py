"""CUDA graphs of a training step's gradients: recorded once per input shape, replayed in every later step."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_runner.batch import Batch
from ssl_runner.errors import one_line

Values = dict[str, Tensor]
WARMUP_STEPS = 3  # eager steps on the recording's stream: they compile, and allocate what libraries keep


@dataclass
class Recording:
    """A recorded step: its input and output tensors, whose memory every replay reads and overwrites."""

    X: Tensor
    labels: Tensor
    values: Values
    gradients: list[Tensor | None]
    replay: Callable[[], None]


class StepGraph:
    """Computes the gradients of a step by replaying a CUDA graph, which costs the host a single launch.

    compute(X, batch) sets the gradients of `parameters`, from none, and returns scalars. It must be
    capturable: shapes are fixed, and everything that differs between steps is in X, in the labels, in tensors
    that are updated in place, or drawn from the device's default generator.

    The first steps of every shape of X run eagerly, and are steps of the training like all others. If
    recording fails, all later steps run eagerly, and one line says so.
    """

    def __init__(
        self, compute: Callable[[Tensor, Batch], Values], parameters: Sequence[Tensor], capture: "Capture"
    ):
        self.compute, self.parameters, self.capture = compute, parameters, capture
        self.recordings: dict[torch.Size, Recording] = {}
        self.eager_steps: Counter[torch.Size] = Counter()
        self.failed = False

    def __call__(self, X: Tensor, batch: Batch) -> Values:
        """Set the gradients of a step. Returns its scalars, which the next call does not change."""
        if self.failed:
            return self.compute(X, batch)
        if X.shape not in self.recordings:
            if self.eager_steps[X.shape] < WARMUP_STEPS:
                self.eager_steps[X.shape] += 1
                with self.capture.stream():
                    return self.compute(X, batch)
            try:
                self.recordings[X.shape] = self._record(X, batch)
            except RuntimeError as error:
                self.failed = True
                print(f"compile=graphs: the step cannot be recorded ({one_line(error)}): it runs without")
                return self.compute(X, batch)
        recording = self.recordings[X.shape]
        recording.X.copy_(X)
        recording.labels.copy_(batch.labels)
        recording.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in recording.values.items()}

    def _record(self, X: Tensor, batch: Batch) -> Recording:
        X, labels = X.clone(), batch.labels.clone()
        values, replay = self.capture.record(lambda: self.compute(X, replace(batch, labels=labels)))
        return Recording(X, labels, values, [parameter.grad for parameter in self.parameters], replay)


class Capture:
    """Records on a CUDA device. Nothing runs while it records; the first replay is the first execution."""

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device)

    @contextmanager
    def stream(self) -> Any:
        """Run on the stream that records, so that autograd's state is not tied to another stream."""
        current = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            yield
        current.wait_stream(self.side)

    def record(self, work: Callable[[], Values]) -> tuple[Values, Callable[[], None]]:
        """Record `work`. Returns its outputs, which a replay fills, and the replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.side):
            values = work()
        return values, graph.replay


def why_not(device: torch.device, ranks: int, **parts: nn.Module | Any) -> str | None:
    """Return why a step with these parts cannot be recorded in a CUDA graph, or None.

    A part is recorded if its attribute `capturable` is true.
    """
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and this run uses {device.type}"
    if ranks > 1:
        return f"{ranks} processes exchange gradients within a step"
    for name, part in parts.items():
        if not part.capturable:
            return f"{name} ({type(part).__name__}) depends on values of the host"
    return None
