"""Training loop: determinism, exact resume, half precision, clipping, non-finite losses."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from ssl_runner import numerics
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.relation.builders import FromLabels, FromNeighbors, FromViews, RelationBuilder, Rewired
from ssl_runner.runs import checkpoint
from ssl_runner.train import Diverged, Pretraining
from tests.helpers import TIMINGS, pretraining, rows, weights

LOSSES = pytest.mark.parametrize(
    "loss", [VICReg(), SimCLR(), BarlowTwins()], ids=["vicreg", "simclr", "barlow"]
)


@LOSSES
@pytest.mark.parametrize("relation", [FromViews(), FromLabels()])
@pytest.mark.parametrize("V", [2, 3])
def test_training_lowers_loss_and_logs_each_epoch(loss: Loss, relation: RelationBuilder, V: int) -> None:
    training = pretraining(loss, relation, epochs=8, V=V)
    table = rows(training)
    assert [row["epoch"] for row in table] == list(range(1, 9))
    assert [row["step"] for row in table] == list(range(3, 27, 3))
    assert [row["images_seen"] for row in table] == list(range(60, 481, 60))
    assert table[-1]["loss"] < table[0]["loss"]
    for row in table:
        assert_close(
            row["loss"],
            sum(weight * row[name] for name, weight in loss.weights.items()),
            rtol=1e-4,
            atol=1e-4,
        )


def test_training_is_deterministic_given_seed() -> None:
    first = pretraining(dropout=0.3)
    table = rows(first)
    second = pretraining(dropout=0.3)
    assert rows(second) == table
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize(
    "relation",
    [
        FromViews,
        lambda: FromNeighbors(2, queue=50),
        lambda: Rewired(FromLabels()),
        lambda: Rewired(FromNeighbors(2)),
    ],
    ids=["views", "queue", "noisy labels", "noisy neighbors"],
)
def test_resume_is_exact(
    relation: Callable[[], RelationBuilder], stop: int, precision: str, tmp_path
) -> None:
    """Resume restores weights, optimiser, gradient scaler, data order, views, relation and dropout state."""

    def fresh() -> Pretraining:
        training = pretraining(relation=relation(), dropout=0.3, precision=precision)
        training.relation.bind(training.loader.data.pretrain.labels)
        return training

    uninterrupted = fresh()
    expected = rows(uninterrupted)
    first = fresh()
    before_stop = list(itertools.islice(first.epochs(), stop))
    checkpoint.save(first.state_dict(), tmp_path)
    second = fresh()
    torch.rand(7)  # advance the global generator: resume must restore its state
    second.load_state_dict(checkpoint.load(checkpoint.find(tmp_path)))
    before_stop = [{name: value for name, value in row.items() if name not in TIMINGS} for row in before_stop]
    assert before_stop + rows(second) == expected
    for name, value in weights(uninterrupted).items():
        assert torch.equal(value, weights(second)[name])


def test_prefetched_images_give_same_training() -> None:
    assert rows(pretraining(storage="host")) == rows(pretraining())


@LOSSES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_matches_float32_loss_and_learns(loss: Loss, precision: str) -> None:
    """At lr=1e-9 the loss equals that of float32 up to rounding (bf16 has 8 significant bits).

    At the default learning rate it decreases.
    """
    dtypes = []
    half, full = (
        pretraining(loss, precision=precision, lr=1e-9, epochs=1),
        pretraining(loss, lr=1e-9, epochs=1),
    )
    half.model.projector.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    assert_close(rows(half)[0]["loss"], rows(full)[0]["loss"], rtol=0.02, atol=0)
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    training = small_scale(pretraining(loss, precision=precision, epochs=16))
    assert training.scaler.is_enabled() == (precision == "fp16")
    table = rows(training)
    assert table[-1]["loss"] < 0.95 * table[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in training.model.backbone.parameters())


def small_scale(training: Pretraining) -> Pretraining:
    """Set an initial loss scale that does not overflow, so that the gradient scaler skips no steps."""
    if training.scaler.is_enabled():
        training.scaler = torch.amp.GradScaler("cpu", init_scale=128)
    return training


class Quiet:
    """Stand-in for the non-finite check that does nothing."""

    def put(self, step: int, values: dict) -> None:
        pass


class Breaks(VICReg):
    """VICReg whose covariance term becomes `value` at the fifth step."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.step = value, 0

    def _terms(self, Z, G):
        terms = super()._terms(Z, G)
        self.step += 1
        return terms | ({"covariance": terms["covariance"] * self.value} if self.step == 5 else {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_training_immediately(value: float) -> None:
    training = pretraining(Breaks(value))
    epochs = training.epochs()
    next(epochs)
    with pytest.raises(Diverged, match=rf"not finite at step 4: covariance={value}; lower optimizer.lr"):
        next(epochs)
    assert training.loss.step == 5
    assert all(parameter.isfinite().all() for parameter in training.model.backbone.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_gradient_norm(precision: str) -> None:
    """An SGD step with lr=1 equals the negative gradient, so its norm is the clipped norm."""
    training = small_scale(pretraining(clip_grad_norm=0.5, precision=precision, epochs=1))
    parameters = list(training.model.parameters())
    training.optimizer = torch.optim.SGD(parameters, lr=1.0)
    training.learning_rate = lambda step: 1.0
    X, batch = next(training.loader.batches(0))
    before = copy.deepcopy(parameters)

    training._step(X, batch, Quiet())
    moved = torch.stack([(a - b).norm() for a, b in zip(parameters, before, strict=True)]).norm()
    assert_close(moved, torch.tensor(0.5), rtol=1e-3, atol=0)


def test_per_view_forward_runs_one_pass_per_view() -> None:
    calls = []
    training = pretraining(per_view=True, V=3)
    training.model.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    next(training.epochs())
    assert calls == [20] * 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prefetched_images_give_same_training_on_cuda() -> None:
    cuda = torch.device("cuda", 0)
    with numerics.preserved():
        numerics.apply(cuda, "fp32", deterministic=True)
        assert rows(pretraining(storage="host", device=cuda)) == rows(pretraining(device=cuda))
