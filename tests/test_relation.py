"""Relations against their definition, entry by entry."""

import pytest
import torch
from torch.testing import assert_close

from ssl_runner.relation import Edges, Labels, Relation, Views

LEFT = torch.tensor([0, 1, 4, 5, 2])
RIGHT = torch.tensor([1, 0, 2, 0, 4])


def views_by_loop(n: int, V: int) -> torch.Tensor:
    return torch.tensor([[float(i != j and i % n == j % n) for j in range(n * V)] for i in range(n * V)])


def labels_by_loop(y: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[float(i != j and y[i] == y[j]) for j in range(len(y))] for i in range(len(y))])


def edges_by_loop() -> torch.Tensor:
    G = torch.zeros(7, 7)
    for i, j in zip(LEFT, RIGHT, strict=True):
        G[i, j] = G[j, i] = 1
    return G


Y = torch.tensor([2, 0, 1, 2, 2, 0, 3])
CASES = [(Views(n, V), views_by_loop(n, V)) for n, V in [(1, 2), (4, 2), (5, 3), (3, 8)]]
CASES += [(Labels(Y), labels_by_loop(Y)), (Edges(LEFT, RIGHT, 7), edges_by_loop())]


@pytest.mark.parametrize(("G", "dense"), CASES)
def test_a_relation_is_its_definition(G: Relation, dense: torch.Tensor) -> None:
    Z = torch.randn(len(dense), 3, dtype=torch.float64)
    assert G.num_rows == len(dense)
    assert_close(G.dense(), dense)
    assert_close(G.degrees, dense.sum(1))
    assert_close(G @ Z, dense.double() @ Z)
    assert_close(G.edges(), dense.nonzero().T)


@pytest.mark.parametrize(("G", "dense"), CASES)
def test_the_product_is_differentiable(G: Relation, dense: torch.Tensor) -> None:
    Z = torch.randn(len(dense), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda Z: G @ Z, (Z,))


@pytest.mark.parametrize(("G", "other"), [(Views(4, 5, normalized=True), Views(4, 5)), (Labels(Y, normalized=True), Labels(Y))])
def test_the_rows_of_a_normalized_relation_sum_to_one(G: Relation, other: Relation) -> None:
    dense = other.dense()
    expected = dense / dense.sum(1, keepdim=True).clamp(min=1)
    Z = torch.randn(G.num_rows, 3)
    assert_close(G.dense(), expected)
    assert_close(G.degrees, expected.sum(1))
    assert_close(G @ Z, expected @ Z)
    assert_close(G.dense(), G.dense().T)


def test_views_has_the_spectrum_of_the_theory() -> None:
    n, V = 6, 4
    values = torch.linalg.eigvalsh(Views(n, V).dense(torch.float64))
    assert_close(values, torch.tensor([-1.0] * (n * (V - 1)) + [V - 1.0] * n, dtype=torch.float64))


def test_the_relation_of_a_batch() -> None:
    y, V = torch.tensor([0, 1, 0, 2]), 3
    assert_close(Views.of_batch(y, V, 3).dense(), Views(4, 3).dense())
    assert_close(Labels.of_batch(y, V, 3).dense(), labels_by_loop(y.repeat(V)))
    assert (Labels.of_batch(y, V, 3).dense() >= Views.of_batch(y, V, 3).dense()).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Views(4, 1), "V >= 2"),
        (lambda: Views(0, 2), "n >= 1"),
        (lambda: Labels(torch.tensor([0, -1])), "labels >= 0"),
        (lambda: Labels(torch.tensor([0.5])), "integers"),
        (lambda: Labels(torch.empty(0, dtype=torch.long)), "non-empty"),
        (lambda: Edges(torch.tensor([1]), torch.tensor([1]), 3), "paired with itself"),
        (lambda: Edges(torch.tensor([0]), torch.tensor([3]), 3), "from 0 to 2"),
        (lambda: Edges(torch.tensor([0, 1]), torch.tensor([2]), 3), "one length"),
        (lambda: Views(4, 2) @ torch.zeros(7, 3), "relates 8 rows"),
    ],
)
def test_what_a_relation_refuses(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
