"""Several processes compute what one does: losses, gradients, relations, batch norm, views, whole runs."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_runner import backbone, distributed, relate
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SquaredSimCLR, VICReg
from ssl_runner.relation import Labels, Relation, Views
from ssl_runner.views import Augment
from tests.processes import in_processes
from tests.test_train import pretraining, rows, weights
from tests.test_views import FULL

LOSSES = {
    "vicreg": partial(VICReg, 25.0, 2.0, 10.0),
    "vicreg squared": partial(VICReg, 25.0, 25.0, 10.0, variance="squared"),
    "simclr": SimCLR,
    "simclr sum": partial(SimCLR, 0.2, "sum"),
    "simclr_squared": partial(SquaredSimCLR, center=True),
    "barlow": partial(BarlowTwins, 0.02),
    "barlow centred": partial(BarlowTwins, 0.02, center=True),
}
RELATIONS = ("views", "views normalized", "labels", "labels normalized")
n, K, CLASSES = 8, 6, 3  # originals, columns, classes


def data(V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features (V, n, 5) of V views of n originals, their labels, and a matrix whose gradient is asked for."""
    generator = torch.Generator().manual_seed(V)
    X = torch.randn(V, n, 5, generator=generator, dtype=dtype) + 0.3
    y = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])  # in four processes, some have one class only
    return X, y, torch.randn(5, K, generator=generator, dtype=dtype)


def relation(name: str, y: Tensor, V: int) -> Relation:
    normalized = name.endswith("normalized")
    if name.startswith("views"):
        return Views(len(y), V, normalized)
    return Labels(y.repeat(V), CLASSES, normalized)


def value_and_gradient(loss: Loss, name: str, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of X W over this process's part of the rows, and the gradient of W averaged over the processes."""
    X, y, W = data(V, dtype)
    part = slice(distributed.rank() * n // distributed.size(), (distributed.rank() + 1) * n // distributed.size())
    W.requires_grad_()
    value = loss((X[:, part].reshape(-1, 5) @ W).tanh(), relation(name, y[part], V))
    value.backward()
    return value.detach(), distributed.summed(W.grad) / distributed.size()


CASES = list(itertools.product(LOSSES, RELATIONS, (2, 4), (torch.float64, torch.float32)))


def table() -> list[tuple[Tensor, Tensor]]:
    return [value_and_gradient(LOSSES[loss](), name, V, dtype) for loss, name, V, dtype in CASES]


@pytest.mark.parametrize("W", [2, 4])
def test_the_averaged_gradient_of_several_processes_is_that_of_one(W: int) -> None:
    """The parity table: loss x relation x V x W. In float64 to 1e-12 of the largest entry, in float32 to 1e-5."""
    expected = table()
    for rank in in_processes(W, table):
        for case, (value, gradient), (value_of_one, gradient_of_one) in zip(CASES, rank, expected, strict=True):
            tolerance = 1e-12 if case[-1] == torch.float64 else 1e-5
            assert gradient_of_one.abs().max() > 1e-3, case
            assert abs(value - value_of_one) <= tolerance * abs(value_of_one), case
            assert (gradient - gradient_of_one).norm() <= tolerance * gradient_of_one.norm(), case


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6)
    ).double()


def two_steps(order: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Averaged gradients of a network with batch norm, summed over two batches, and its state. Of the rows in `order` this process
    has its part, the first half of which are views of what the second half shows."""
    cpu = torch.device("cpu")
    body = distributed.averaging(distributed.synchronized(network(), cpu), cpu)
    for seed in (0, 1):
        x = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        part = x[order].chunk(distributed.size())[distributed.rank()]
        VICReg()(body(part), Views(len(part) // 2, 2)).backward()
    inner = body.module if distributed.size() > 1 else body
    return [parameter.grad for parameter in inner.parameters()], inner.state_dict()


def test_batch_norm_is_taken_over_the_rows_of_all_processes() -> None:
    """Three processes pair the rows 0-2, 1-3 | 4-6, 5-7 | 8-10, 9-11: the same pairs as one process has of these rows reordered."""
    gradients, state = two_steps(torch.tensor([0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]))
    assert any("running_mean" in name for name in state)
    for theirs, their_state in in_processes(3, two_steps, torch.arange(12)):
        assert_close(theirs, gradients, rtol=1e-9, atol=1e-9)
        assert_close(their_state, state, rtol=1e-12, atol=1e-12)


def synchronized_timm() -> tuple[Tensor, list[str], bool]:
    torch.manual_seed(0)
    body = backbone.from_timm(3, 16, "resnet10t").double()
    names = list(body.state_dict())
    synchronized = distributed.synchronized(body, torch.device("cpu"))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = distributed.gathered(synchronized(x.chunk(distributed.size())[distributed.rank()]).detach())
    return rows, names, list(synchronized.state_dict()) == names


def test_batch_norms_that_hold_an_activation_keep_it_and_their_names() -> None:
    expected, names, _ = synchronized_timm()
    for rows, their_names, kept in in_processes(2, synchronized_timm):
        assert_close(rows, expected, rtol=1e-9, atol=1e-9)
        assert kept
        assert their_names == names


# --- what a step is made of ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("policies", [1, 2])
def test_the_views_of_a_part_of_a_batch_are_those_in_the_whole(parts: int, policies: int) -> None:
    originals = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8)
    plain = {"affine": {"degrees": 9, "translate": 0.1}, "flip": 0.3}
    augment = Augment({"all": FULL} if policies == 1 else {"first": FULL, "second": plain})

    def views(images: Tensor, *part: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        X = augment(images, 3, torch.zeros(3), torch.ones(3), generator, *part)
        return X.unflatten(0, (3, -1)), torch.rand(2, generator=generator)

    whole, after = views(originals)
    for part, images in enumerate(originals.chunk(parts)):
        own, after_part = views(images, part, parts)
        assert_close(own, whole.chunk(parts, dim=1)[part], rtol=0, atol=1e-6)
        assert torch.equal(after_part, after)


class Mean(Loss):
    """A user's loss, which knows nothing of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"distance": 1.0, "size": 3.0}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return {"distance": ((G.degrees[:, None] * Z - G @ Z) * Z).mean(), "size": (1 - Z.var(0)).square().sum()}


TRAININGS = {
    "vicreg": lambda: pretraining(VICReg(), relate.Views()),
    "vicreg V=3 separate": lambda: pretraining(VICReg(), relate.Views(), V=3, separate=True),
    "simclr labels": lambda: pretraining(SimCLR(), relate.Labels()),
    "barlow clipped": lambda: pretraining(BarlowTwins(), relate.Views(), clip=0.5),
    "barlow normalized labels": lambda: pretraining(BarlowTwins(), relate.Labels(True)),
    "neighbors": lambda: pretraining(SimCLR(), relate.Neighbors(2)),
    "queue": lambda: pretraining(VICReg(), relate.Neighbors(2, queue=30)),
    "noisy labels": lambda: pretraining(VICReg(), relate.Noisy("labels", 0.5)),
    "a user's loss": lambda: pretraining(Mean(), relate.Views()),
    "images on the host": lambda: pretraining(VICReg(), relate.Labels(), location="host"),
}


def curves(names: list[str]) -> list[tuple[list[dict], dict[str, Tensor]]]:
    """The table and the weights of each training; float64 networks, so that roundings do not grow into differences."""
    trained = []
    for name in names:
        training = TRAININGS[name]()
        training.relation.bind(training.data.pretrain.labels)
        training.backbone.double()
        training.projector.double()
        training.augment = Doubled(training.augment)
        training.backbone = distributed.synchronized(training.backbone, training.device)
        training.projector = distributed.synchronized(training.projector, training.device)
        training.network = distributed.averaging(nn.Sequential(training.backbone, training.projector), training.device)
        trained.append((rows(training), weights(training)))
    return trained


class Doubled:
    """Views in float64."""

    def __init__(self, augment: Augment):
        self.augment = augment

    def __call__(self, *arguments: object) -> Tensor:
        return self.augment(*arguments).double()


TOLERANCE = dict.fromkeys(("neighbors", "queue", "a user's loss", "noisy labels"), 1e-4)  # gathered rows are float32


@pytest.mark.parametrize("W", [2, 4])
def test_a_training_of_several_processes_has_the_loss_curve_of_one(W: int) -> None:
    """For every relation, those that need all rows too, and for a loss that was written without a thought of processes."""
    expected = curves(list(TRAININGS))
    for results in in_processes(W, curves, list(TRAININGS)):
        for name, (table, state), (table_of_one, state_of_one) in zip(TRAININGS, results, expected, strict=True):
            loose = name in ("neighbors", "queue", "a user's loss", "noisy labels")
            assert_close(
                table, table_of_one, rtol=1e-4 if loose else 1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert_close(
                state, state_of_one, rtol=1e-2, atol=1e-3 if loose else 1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
