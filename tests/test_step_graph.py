"""Gradients of a step from a recorded graph, with a stand-in for CUDA's capture that runs on a CPU."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation.builders import FromLabels, FromNeighbors, FromViews, RelationBuilder, Rewired
from ssl_runner.step_graph import WARMUP_STEPS, StepGraph, Values, why_not
from ssl_runner.train import Pretraining
from tests.helpers import pretraining, rows, weights


class HostCapture:
    """Records as CUDA does: recording changes nothing, and a replay fills the tensors that it returned."""

    def __init__(self, training: Pretraining):
        self.training, self.recorded, self.replays = training, 0, 0

    def stream(self) -> Any:
        return nullcontext()

    def record(self, work: Callable[[], Values]) -> tuple[Values, Callable[[], None]]:
        buffers = dict(self.training.model.named_buffers())
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


def test_gradients_of_two_recordings_are_not_mixed_up() -> None:
    """Steps that alternate between two shapes get the gradients of their own shape."""
    training = pretraining()
    recorded(training)
    loader = training.loader
    small, large = (
        next(iter(loader.batches(0, size=size))) for size in (10, 20)
    )  # (X, batch), with 10 and with 20 images
    for _ in range(WARMUP_STEPS + 1):
        for X, batch in (small, large):
            training.gradients(X, batch)
    for X, batch in (small, large, small):
        training.gradients(X, batch)
        found = [p.grad.clone() for p in training.parameters() if p.grad is not None]
        training._gradients(X, batch)
        for a, b in zip(found, [p.grad for p in training.parameters()], strict=True):
            assert torch.equal(a, b)


def test_step_that_cannot_be_recorded_runs_eagerly_and_says_so_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = rows(pretraining())
    training = pretraining()
    capture = recorded(training)

    def refuse(work: Callable[[], Values]) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    capture.record = refuse  # type: ignore[method-assign]
    assert [row["step"] for row in rows(training)] == [row["step"] for row in expected]
    assert capsys.readouterr().out.count("compile=graphs: the step cannot be recorded (operation not") == 1


class OwnTerms(VICReg):
    def _terms(self, Z: Tensor, G: Any) -> dict[str, Tensor]:
        return super()._terms(Z, G)


CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "ranks", "loss", "relation", "reason"),
    [
        (CUDA, 1, VICReg(), FromViews(), None),
        (CUDA, 1, SimCLR(), FromLabels(normalized=True), None),
        (CUDA, 1, BarlowTwins(), FromNeighbors(2), None),
        (CUDA, 1, VICReg(), FromNeighbors(2, queue=9), r"relation \(FromNeighbors\) depends on values"),
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
