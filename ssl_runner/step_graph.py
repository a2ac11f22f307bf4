"""A CUDA graph of a training step's gradients: recorded once per shape, replayed in every later step."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ssl_runner.batch import Batch, ViewTensors, per_size
from ssl_runner.device import syncs_raise
from ssl_runner.errors import UsageError, one_line

Values = dict[str, Tensor]
Shapes = tuple[torch.Size, ...]  # of X, one per size
WARMUP_STEPS = 3  # eager steps on the recording's stream: they compile, and allocate what libraries keep


@dataclass
class Recording:
    """A recorded step: its input and output tensors, whose memory every replay reads and overwrites."""

    X: list[Tensor]  # one per size
    labels: Tensor
    values: Values
    gradients: list[Tensor | None]
    replay: Callable[[], None]


class StepGraph:
    """Computes the gradients of a step by replaying a CUDA graph, which costs the host a single launch.

    compute(X, batch) sets the gradients of `parameters`, from none, and returns scalars. It must be
    capturable: shapes are fixed, and everything that differs between steps is in X, in the labels, in tensors
    that are updated in place, or drawn from the device's default generator.

    The first steps of every shape of X run eagerly, and are steps of the training like all others. The last
    of them is checked for host-device syncs, which cannot be recorded: if it has one, all later steps run
    eagerly, and one line says so. Only the graph of the current shape is kept: it holds all activations.
    """

    def __init__(
        self,
        compute: Callable[[ViewTensors, Batch], Values],
        parameters: Sequence[Tensor],
        capture: "Capture",
    ):
        self.compute, self.parameters, self.capture = compute, parameters, capture
        self.recording: Recording | None = None
        self.eager_steps: Counter[Shapes] = Counter()
        self.has_syncs = False

    def __call__(self, X: ViewTensors, batch: Batch) -> Values:
        """Set the gradients of a step. Returns its scalars, which the next call does not change."""
        if self.has_syncs:
            return self.compute(X, batch)
        shapes = shapes_of(X)
        if self.eager_steps[shapes] < WARMUP_STEPS:
            self.eager_steps[shapes] += 1
            return self._warm_up(X, batch, check=self.eager_steps[shapes] == WARMUP_STEPS)
        if self.recording is None or shapes_of(self.recording.X) != shapes:
            self._record(X, batch)
        recording = self.recording
        assert recording is not None
        for static, x in zip(recording.X, per_size(X), strict=True):
            static.copy_(x)
        recording.labels.copy_(batch.labels)
        recording.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in recording.values.items()}

    def _warm_up(self, X: ViewTensors, batch: Batch, check: bool) -> Values:
        with self.capture.stream():
            if not check:
                return self.compute(X, batch)
            try:
                with self.capture.syncs_raise():
                    return self.compute(X, batch)
            except RuntimeError as error:
                self.has_syncs, reason = True, one_line(error)
        print(f"compile=graphs: the step cannot be recorded ({reason}): it runs without a graph", flush=True)
        return self.compute(X, batch)  # the running statistics of batch norm see this batch twice

    def _record(self, X: ViewTensors, batch: Batch) -> None:
        self.recording = None  # frees the memory of another shape
        for parameter in self.parameters:
            parameter.grad = None
        static, labels = [x.clone() for x in per_size(X)], batch.labels.clone()
        inputs = static if isinstance(X, list) else static[0]
        try:
            values, replay = self.capture.record(lambda: self.compute(inputs, replace(batch, labels=labels)))
        except RuntimeError as error:  # torch cannot compute reliably after a capture that failed
            cause = one_line(error.__context__ or error)
            raise UsageError(
                f"compile=graphs: the step cannot be recorded ({cause}); use compile=true"
            ) from error
        gradients = [parameter.grad for parameter in self.parameters]
        self.recording = Recording(static, labels, values, gradients, replay)


def shapes_of(X: ViewTensors) -> Shapes:
    return tuple(x.shape for x in per_size(X))


class Capture:
    """Records on a CUDA device. Nothing runs while it records; the first replay is the first execution."""

    syncs_raise = staticmethod(syncs_raise)

    def __init__(self, device: torch.device):
        self.side = side_stream(device)

    @contextmanager
    def stream(self) -> Any:
        """Run on the stream that records, so that autograd's state is not tied to another stream."""
        current = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            yield
        current.wait_stream(self.side)

    def record(self, work: Callable[[], Values]) -> tuple[Values, Callable[[], None]]:
        """Record `work`. Returns its outputs, which a replay fills, and the replay.

        Other threads, such as the one that prefetches images, may use CUDA meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.side, capture_error_mode="thread_local"):
            values = work()
        return values, graph.replay


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which this process records. torch gives the 33rd stream a second time."""
    return torch.cuda.Stream(device)


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
