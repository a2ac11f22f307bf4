"""Training loop: determinism, exact resume, precision, clipping, non-finite losses, device choice."""

import copy
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssl_runner import backbone, optimizer, projector
from ssl_runner.batch import Batch
from ssl_runner.device import choose_device, choose_precision
from ssl_runner.errors import UsageError
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.relation.builders import FromLabels, FromNeighbors, FromViews, RelationBuilder, Rewired
from ssl_runner.runs import checkpoint
from ssl_runner.train import Diverged, Pretraining
from ssl_runner.views.policy import Augment
from tests.test_dataset import CPU, load, toy

TIMINGS = ("seconds", "images_per_s")


def pretraining(
    loss: Loss | None = None,
    relation: RelationBuilder | None = None,
    epochs: int = 3,
    precision: str = "fp32",
    clip: float | None = None,
    lr: float = 1e-2,
    V: int = 2,
    separate: bool = False,
    dropout: float = 0.0,
    location: str = "auto",
    device: torch.device = CPU,
) -> Pretraining:
    torch.manual_seed(0)
    source = toy()
    source.images = torch.randint(0, 256, source.images.shape, dtype=torch.uint8)
    data = load(source, location=location, device=device)
    body = backbone.convnet(3, 4, [4, 8]).to(device)
    head = nn.Sequential(nn.Dropout(dropout), projector.mlp(8, 8, 2, 5)).to(device)
    loss = loss or VICReg()
    return Pretraining(
        body,
        head,
        loss,
        optimizer.build([body, head], torch.optim.AdamW, lr, 1e-2),
        partial(optimizer.cosine, steps=epochs * 3, warmup=2, lr=lr, final=0.0),
        data,
        Augment({"all": {"crop": {"scale": [0.3, 1.0]}, "flip": 0.5}}),
        relation or FromViews(),
        V=V,
        epochs=epochs,
        batch_size=20,
        clip=clip,
        precision=precision,
        channels_last=True,
        separate=separate,
        seed=0,
    )


def first_batch(training: Pretraining) -> tuple[torch.Tensor, Batch]:
    order = torch.arange(20)
    [(images, labels)] = training.data.pretrain.batches(order, 20, training.device)
    return images, Batch(
        training.data.pretrain.indices[order], labels, training.V, len(training.data.classes)
    )


def rows(training: Pretraining) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in training.epochs()]


def weights(training: Pretraining) -> dict[str, torch.Tensor]:
    return {**training.backbone.state_dict(prefix="b."), **training.projector.state_dict(prefix="p.")}


@pytest.mark.parametrize("loss", [VICReg(), SimCLR(), BarlowTwins()], ids=["vicreg", "simclr", "barlow"])
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
    [FromViews, lambda: FromNeighbors(2, queue=50), Rewired, lambda: Rewired("neighbors", k=2)],
    ids=["views", "queue", "noisy", "noisy neighbors"],
)
def test_resume_is_exact(
    relation: Callable[[], RelationBuilder], stop: int, precision: str, tmp_path
) -> None:
    """Resume restores weights, optimiser, gradient scaler, data order, views, relation and dropout state."""

    def fresh() -> Pretraining:
        training = pretraining(relation=relation(), dropout=0.3, precision=precision)
        training.relation.bind(training.data.pretrain.labels)
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
    assert rows(pretraining(location="host")) == rows(pretraining())


@pytest.mark.parametrize("loss", [VICReg(), SimCLR(), BarlowTwins()], ids=["vicreg", "simclr", "barlow"])
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
    half.projector.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    assert_close(rows(half)[0]["loss"], rows(full)[0]["loss"], rtol=0.02, atol=0)
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    training = small_scale(pretraining(loss, precision=precision, epochs=16))
    assert training.scaler.is_enabled() == (precision == "fp16")
    table = rows(training)
    assert table[-1]["loss"] < 0.95 * table[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in training.backbone.parameters())


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
    assert all(parameter.isfinite().all() for parameter in training.backbone.parameters())


def test_clipping_bounds_gradient_norm() -> None:
    """An SGD step with lr=1 equals the negative gradient, so its norm is the clipped norm."""
    for precision in ("fp32", "fp16"):
        training = small_scale(pretraining(clip=0.5, precision=precision, epochs=1))
        parameters = [*training.backbone.parameters(), *training.projector.parameters()]
        training.optimizer = torch.optim.SGD(parameters, lr=1.0)
        training.learning_rate = lambda step: 1.0
        images, batch = first_batch(training)
        before = copy.deepcopy(parameters)

        training._step(images, batch, 1.0, Quiet())
        moved = torch.stack([(a - b).norm() for a, b in zip(parameters, before, strict=True)]).norm()
        assert_close(moved, torch.tensor(0.5), rtol=1e-3, atol=0)


def test_separate_forward_runs_one_pass_per_view() -> None:
    calls = []
    training = pretraining(separate=True, V=3)
    training.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    next(training.epochs())
    assert calls == [20] * 9


def test_choose_device_returns_available_device_or_raises() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto").type in ("cpu", "mps")
        for device in ("cuda", "cuda:1"):
            with pytest.raises(UsageError, match=f"device={device}: this machine has no CUDA device"):
                choose_device(device)
    if not torch.backends.mps.is_available():
        with pytest.raises(UsageError, match="no MPS device"):
            choose_device("mps")


def test_choose_precision_returns_supported_precision_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, mps = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
    assert choose_precision("auto", mps) == "fp32"
    for capabilities, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_f": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert choose_precision("auto", cpu) == expected
    assert choose_precision("bf16", cpu) == "bf16"
    with pytest.raises(UsageError, match="precision=fp16: mps does not support it"):
        choose_precision("fp16", mps)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", cuda) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert choose_precision("auto", cuda) == "fp16"
    with pytest.raises(UsageError, match="precision=bf16: cuda does not support it"):
        choose_precision("bf16", cuda)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prefetched_images_give_same_training_on_cuda() -> None:
    cuda = torch.device("cuda")
    assert_close(
        rows(pretraining(location="host", device=cuda)), rows(pretraining(device=cuda)), rtol=1e-3, atol=1e-3
    )
