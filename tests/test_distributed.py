"""Several processes compute what one does: losses, gradients, relations, batch norm, views, whole runs."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_runner import distributed
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SquaredSimCLR, VICReg
from ssl_runner.relation import Labels, Relation, Views
from tests.processes import in_processes

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


def normalized_features() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of a network with batch norm, averaged, and its state, after two batches of which this process has a part."""
    body = distributed.averaging(distributed.synchronized(network(), torch.device("cpu")), torch.device("cpu"))
    for seed in (0, 1):
        x = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        part = x.chunk(distributed.size())[distributed.rank()]
        VICReg()(body(part), Views(len(part) // 2, 2)).backward()
    inner = body.module if distributed.size() > 1 else body
    return [parameter.grad for parameter in inner.parameters()], inner.state_dict()


def test_batch_norm_is_taken_over_the_rows_of_all_processes() -> None:
    gradients, state = normalized_features()

    # in one process the rows of a pair are i and i + 6; in three, whose parts are four rows, i and i + 2
    def in_one() -> tuple[list[Tensor], dict[str, Tensor]]:
        body = network()
        for seed in (0, 1):
            x = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            x = x.view(3, 2, 2, 2, 4, 4).transpose(0, 1).reshape(12, 2, 4, 4)
            VICReg()(body(x), Views(6, 2)).backward()
        return [parameter.grad for parameter in body.parameters()], body.state_dict()

    gradients, state = in_one()
    for theirs, their_state in in_processes(3, normalized_features):
        assert_close(theirs, gradients, rtol=1e-9, atol=1e-9)
        assert_close(their_state, state, rtol=1e-12, atol=1e-12)
