"""Gradients of a step from a recorded graph, with a stand-in for CUDA's capture that runs on a CPU."""

import re
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_runner.errors import UsageError
from ssl_runner.loss import BarlowTwins, Loss, SIGReg, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation.builders import FromLabels, FromNeighbors, FromViews, RelationBuilder, Rewired
from ssl_runner.relation.walks import FromWalks
from ssl_runner.step_graph import WARMUP_STEPS, StepGraph, Values, why_not
from ssl_runner.train import Pretraining
from ssl_runner.views import Augment
from tests.helpers import TWO_SIZES, pretraining, rows, weights


class HostCapture:
    """Records as CUDA does: recording changes nothing, and a replay fills the tensors that it returned."""

    def __init__(self, training: Pretraining):
        self.training, self.recorded, self.replays = training, 0, 0

    def stream(self) -> Any:
        return nullcontext()

    def syncs_raise(self) -> Any:
        return nullcontext()

    def record(self, work: Callable[[], Values]) -> tuple[Values, Callable[[], None]]:
        model, loss = self.training.model, self.training.loss
        buffers = dict([*model.named_buffers(), *loss.named_buffers()])
        state = {name: buffer.clone() for name, buffer in buffers.items()}
        random = torch.get_rng_state()
        values = work()
        gradients = [parameter.grad for parameter in self.training.parameters()]
        torch.set_rng_state(random)
        for name, buffer in buffers.items():
            buffer.copy_(state[name])
        for tensor in [*values.values(), *(g for g in gradients if g is not None)]:
            tensor.fill_(torch.nan)  # nothing has run
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            for name, value in work().items():
                values[name].copy_(value)
            for parameter, gradient in zip(self.training.parameters(), gradients, strict=True):
                if gradient is not None:
                    gradient.copy_(parameter.grad)
                    parameter.grad = None  # the caller must put the recorded one in place

        return values, replay


def recorded(training: Pretraining) -> HostCapture:
    capture: Any = HostCapture(training)
    training.gradients = StepGraph(training._gradients, training.parameters(), capture)
    return capture


@pytest.mark.parametrize(
    ("loss", "relation", "options"),
    [
        (VICReg, FromViews, {}),
        (SimCLR, FromLabels, {"clip_grad_norm": 0.1}),
        (BarlowTwins, lambda: FromNeighbors(2), {"precision": "fp16"}),
        (SpectralContrastive, FromViews, {"V": 3, "per_view": True}),
        (VICReg, FromViews, {"V": 5, "augment": Augment(TWO_SIZES)}),
        (lambda: torch.manual_seed(0) and SIGReg(), FromViews, {}),
    ],
)
def test_replayed_steps_train_exactly_as_eager_ones(
    loss: Callable[[], Loss], relation: Callable[[], RelationBuilder], options: dict[str, Any]
) -> None:
    """With dropout, batch norm and a new learning rate in every step."""
    eager = pretraining(loss(), relation(), dropout=0.3, **options)
    expected = rows(eager)
    replayed = pretraining(loss(), relation(), dropout=0.3, **options)
    capture = recorded(replayed)
    assert rows(replayed) == expected
    assert (capture.recorded, capture.replays) == (1, 9 - WARMUP_STEPS)
    for name, value in weights(eager).items():
        assert torch.equal(value, weights(replayed)[name])


def test_each_view_size_has_a_recording() -> None:
    def fresh() -> Pretraining:
        training = pretraining(epochs=6)
        training.loader.resolutions = (4, 8)
        return training

    eager, replayed = fresh(), fresh()
    expected, capture = rows(eager), recorded(replayed)
    assert rows(replayed) == expected
    assert (capture.recorded, capture.replays) == (2, 18 - 2 * WARMUP_STEPS)


def test_shapes_that_alternate_get_gradients_of_their_own() -> None:
    """Only one recording is kept, since each holds the memory of all activations."""
    training = pretraining()
    capture = recorded(training)
    small, large = (next(iter(training.loader.batches(0, size=size))) for size in (10, 20))
    for X, batch in WARMUP_STEPS * [small, large]:
        training.gradients(X, batch)
    for X, batch in (small, large, small):
        training.gradients(X, batch)
        found = [p.grad.clone() for p in training.parameters() if p.grad is not None]
        training._gradients(X, batch)
        for a, b in zip(found, [p.grad for p in training.parameters()], strict=True):
            assert torch.equal(a, b)
    assert capture.recorded == 3


def test_step_with_syncs_runs_eagerly_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def syncs_raise() -> Any:
        yield
        raise RuntimeError("called a synchronizing CUDA operation\nmore lines")

    expected = rows(pretraining())
    training = pretraining()
    capture = recorded(training)
    capture.syncs_raise = syncs_raise  # type: ignore[method-assign]
    assert rows(training) == expected
    assert capture.recorded == 0
    line = "compile=graphs: the step cannot be recorded (called a synchronizing CUDA operation more lines)"
    assert capsys.readouterr().out == f"{line}: it runs without a graph\n"


def test_capture_that_fails_ends_the_run_with_its_cause() -> None:
    training = pretraining()
    capture = recorded(training)

    def record(work: Callable[[], Values]) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    capture.record = record  # type: ignore[method-assign]
    with pytest.raises(
        UsageError, match=r"cannot be recorded \(operation not permitted .*; use compile=true"
    ):
        rows(training)


class OwnTerms(VICReg):
    def _terms(self, Z: Tensor, G: Any) -> dict[str, Tensor]:
        return super()._terms(Z, G)


class OwnNeighbors(FromNeighbors):
    def __call__(self, batch: Any, Z: Tensor) -> Any:
        return super().__call__(batch, Z)


CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "ranks", "loss", "relation", "reason"),
    [
        (CUDA, 1, VICReg(), FromViews(), None),
        (CUDA, 1, SimCLR(), FromLabels(normalized=True), None),
        (CUDA, 1, BarlowTwins(), FromNeighbors(2), None),
        (CUDA, 1, VICReg(), FromNeighbors(2, queue=9), r"relation \(FromNeighbors\) depends on values"),
        (CUDA, 1, VICReg(), OwnNeighbors(2), r"relation \(OwnNeighbors\) depends on values"),
        (CUDA, 1, VICReg(), FromWalks(2), r"relation \(FromWalks\) depends on values"),
        (CUDA, 1, VICReg(), FromLabels(path="a.csv"), r"relation \(FromLabels\) depends on values"),
        (CUDA, 1, VICReg(), Rewired(FromViews()), r"relation \(Rewired\) depends on values"),
        (CUDA, 1, OwnTerms(), FromViews(), r"loss \(OwnTerms\) depends on values"),
        (CUDA, 2, VICReg(), FromViews(), "2 processes exchange gradients"),
        (torch.device("cpu"), 1, VICReg(), FromViews(), "need a CUDA device, and this run uses cpu"),
    ],
)
def test_parts_that_depend_on_the_host_are_not_recorded(
    device: torch.device, ranks: int, loss: nn.Module, relation: RelationBuilder, reason: str | None
) -> None:
    found = why_not(device, ranks, loss=loss, relation=relation)
    assert found is None if reason is None else re.search(reason, found or "")
