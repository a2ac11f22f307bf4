"""Relations, compared with their definition entry by entry."""

import math

import pytest
import torch
from torch.testing import assert_close

from ssl_runner import numerics
from ssl_runner.relation import (
    DegreeNormalized,
    Edges,
    KNearest,
    Labels,
    Relation,
    SharedLabels,
    ViewExpanded,
    Views,
    WithSupportSet,
    rewire,
)
from ssl_runner.relation.derived import pair_of_number
from ssl_runner.relation.operators import MAX_ROWS

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


# 0-1, 1-2 and 3-4 are mutual neighbours, all other pairs one-sided
NEIGHBORS = torch.tensor([[1, 3], [0, 2], [1, 0], [4, 0], [3, 1]])


def nearest_neighbors_by_loop() -> torch.Tensor:
    return torch.tensor([[float(j in NEIGHBORS[i] or i in NEIGHBORS[j]) for j in range(5)] for i in range(5)])


def view_expanded_by_loop(A: torch.Tensor, V: int) -> torch.Tensor:
    n, rows = len(A), range(len(A) * V)
    return torch.tensor(
        [[float(i != j and (i % n == j % n or A[i % n, j % n] > 0)) for j in rows] for i in rows]
    )


def support_set_by_loop(n: int, V: int, k: int) -> torch.Tensor:
    G = torch.zeros(V * n + n * k, V * n + n * k)
    G[: V * n, : V * n] = views_by_loop(n, V)
    for i in range(V * n):
        for a in range(k):
            G[i, V * n + i % n * k + a] = G[V * n + i % n * k + a, i] = 1
    return G


Y = torch.tensor([2, 0, 1, 2, 2, 0, 3])
CASES = [(Views(n, V), views_by_loop(n, V)) for n, V in [(1, 2), (4, 2), (5, 3), (3, 8)]]
CASES += [(Labels(Y), labels_by_loop(Y)), (Edges(LEFT, RIGHT, 7), edges_by_loop())]
CASES += [(KNearest(NEIGHBORS), nearest_neighbors_by_loop())]
CASES += [(ViewExpanded(KNearest(NEIGHBORS), 3), view_expanded_by_loop(nearest_neighbors_by_loop(), 3))]
CASES += [(ViewExpanded(Edges(LEFT, RIGHT, 7), 2), view_expanded_by_loop(edges_by_loop(), 2))]
SEVERAL = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]])


def shared_labels_by_loop() -> torch.Tensor:
    rows = [set(row.nonzero()[:, 0].tolist()) for row in SEVERAL]
    N = range(len(rows))
    return torch.tensor([[float(i != j and len(rows[i] & rows[j])) for j in N] for i in N])


CASES += [(SharedLabels(SEVERAL), shared_labels_by_loop())]
CASES += [(SharedLabels(torch.nn.functional.one_hot(Y)), labels_by_loop(Y))]
CASES += [(WithSupportSet(3, 2, torch.zeros(3 * k, 1)), support_set_by_loop(3, 2, k)) for k in (1, 2)]


@pytest.mark.parametrize(("G", "dense"), CASES)
def test_relation_matches_definition(G: Relation, dense: torch.Tensor) -> None:
    Z = torch.randn(len(dense), 3, dtype=torch.float64)
    assert G.num_rows == len(dense)
    assert_close(G.dense(), dense)
    assert_close(G.degrees, dense.sum(1))
    assert_close(G @ Z, dense.double() @ Z)
    assert_close(G.edges(), dense.nonzero().T)


@pytest.mark.parametrize(("G", "dense"), CASES)
def test_product_passes_gradcheck(G: Relation, dense: torch.Tensor) -> None:
    Z = torch.randn(len(dense), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda Z: G @ Z, (Z,))


def test_edges_backward_does_not_transpose_sparse_matrix() -> None:
    """The backward of torch.sparse.mm transposes G and then has to sort (coalesce) it."""
    G, dense = Edges(LEFT, RIGHT, 7), edges_by_loop()
    Z, weight = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3)
    with torch.profiler.profile(acc_events=True) as profile:  # otherwise torch 2.11 warns
        ((G @ Z) * weight).sum().backward()
    assert_close(Z.grad, dense @ weight)
    operators = [event.key for event in profile.key_averages()]
    assert not [name for name in operators if "coalesce" in name or "transpose" in name]
    assert torch.autograd.gradgradcheck(lambda Z: G @ Z.square(), (Z.detach().double().requires_grad_(),))


def test_deterministic_edges_are_sums_of_rows() -> None:
    """The product with a sparse matrix is not deterministic in cuSPARSE, and torch does not detect it."""
    G, dense = Edges(LEFT, RIGHT, 7), edges_by_loop()
    Z, weight = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3)
    with numerics.preserved(), torch.profiler.profile(acc_events=True) as profile:
        numerics.apply(torch.device("cpu"), "fp32", deterministic=True)
        GZ = G @ Z
        (GZ * weight).sum().backward()
    assert_close(GZ, dense @ Z)
    assert_close(Z.grad, dense @ weight)
    assert not [event.key for event in profile.key_averages() if "sparse" in event.key]


@pytest.mark.parametrize(
    ("G", "unnormalized"),
    [(Views(4, 5, normalized=True), Views(4, 5)), (Labels(Y, normalized=True), Labels(Y))],
)
def test_normalized_views_and_labels_rows_sum_to_one(G: Relation, unnormalized: Relation) -> None:
    dense = unnormalized.dense()
    expected = dense / dense.sum(1, keepdim=True).clamp(min=1)
    Z = torch.randn(G.num_rows, 3)
    assert_close(G.dense(), expected)
    assert_close(G.degrees, expected.sum(1))
    assert_close(G @ Z, expected @ Z)
    assert_close(G.dense(), G.dense().T)


def test_views_spectrum_matches_theory() -> None:
    n, V = 6, 4
    values = torch.linalg.eigvalsh(Views(n, V).dense(torch.float64))
    assert_close(values, torch.tensor([-1.0] * (n * (V - 1)) + [V - 1.0] * n, dtype=torch.float64))


@pytest.mark.parametrize(("G", "dense"), CASES)
def test_normalized_relation_matches_symmetric_normalization(G: Relation, dense: torch.Tensor) -> None:
    scale = dense.sum(1).clamp(min=1).rsqrt()
    expected = scale[:, None] * dense * scale
    normalized = DegreeNormalized(G)
    Z = torch.randn(len(dense), 3)
    assert_close(normalized.dense(), expected)
    assert_close(normalized.degrees.float(), expected.sum(1))
    assert_close(normalized @ Z, expected @ Z)
    assert_close(normalized.edges(), dense.nonzero().T)


def test_normalized_shared_labels_match_symmetric_normalization() -> None:
    G, expected = SharedLabels(SEVERAL, normalized=True), DegreeNormalized(SharedLabels(SEVERAL))
    assert_close(G.dense(), expected.dense())
    assert_close(G.degrees, expected.degrees)


ALL_RELATIONS = [G for G, _ in CASES] + [DegreeNormalized(G) for G, _ in CASES]
ALL_RELATIONS += [
    Views(4, 5, normalized=True),
    Labels(Y, normalized=True),
    Labels(torch.arange(3), normalized=True),
    SharedLabels(SEVERAL, normalized=True),
]


@pytest.mark.parametrize("G", ALL_RELATIONS)
def test_edges_and_weights_match_dense_entries(G: Relation) -> None:
    dense = G.dense()
    assert_close(G.weights(), dense[tuple(G.edges())].double())
    assert_close(G.square_norm.float(), dense.square().sum())


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "G", [Labels(torch.arange(60) % 4), Views(30, 2), Labels(torch.zeros(40, dtype=torch.long)), Views(1, 2)]
)
def test_rewire_keeps_number_of_pairs_and_replaces_fraction_p(G: Relation, p: float) -> None:
    """Includes complete graphs, in which removed pairs can only be replaced by removed pairs."""
    rewired = rewire(G, p, torch.Generator().manual_seed(3))
    before, after = G.dense() > 0, rewired.dense() > 0
    pairs = int(before.sum()) // 2
    assert int(after.sum()) // 2 == pairs
    assert int((before & ~after).sum()) // 2 <= round(p * pairs)
    assert_close(rewired.dense(), rewire(G, p, torch.Generator().manual_seed(3)).dense())
    if p == 0:
        assert_close(rewired.dense(), G.dense())
    elif not before.float().fill_diagonal_(1).all():
        assert (rewired.dense() != rewire(G, p, torch.Generator().manual_seed(4)).dense()).any()


@pytest.mark.parametrize(
    ("p", "positive", "negative"), [(0.5, 0.5 + 0.5 * 6 / 30, 6 / 30), (1.0, 12 / 36, 12 / 36)]
)
def test_rewire_draws_new_pairs_uniformly_from_pairs_not_kept(
    p: float, positive: float, negative: float
) -> None:
    """`positive` and `negative`: probability that a positive or negative pair of G is a pair of the result.

    G has 12 of 36 pairs. At p = 0.5, the 6 new pairs are drawn from the 30 pairs that are not kept, so a pair
    of G is kept or may be drawn again. At p = 1, all pairs are equally likely. Over 1,000 seeds the standard
    deviation of each frequency is at most 0.016.
    """
    G = Labels(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    frequency = sum(rewire(G, p, torch.Generator().manual_seed(seed)).dense() for seed in range(1000)) / 1000
    assert (frequency[G.dense() > 0] - positive).abs().max() < 0.05
    assert (frequency[G.dense() + torch.eye(9) == 0] - negative).abs().max() < 0.05


def test_rewire_scales_to_many_rows() -> None:
    # a list of all 2e10 pairs would not fit into memory
    rewired = rewire(Views(100_000, 2), 1.0, torch.Generator().manual_seed(0))
    i, j = rewired.edges()
    assert rewired.num_rows == 200_000
    assert (i < j).sum() == 100_000
    assert_close(i.double().mean() / 200_000, torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=0.005)


def test_pairs_are_numbered_exactly_up_to_the_largest_number_of_rows() -> None:
    N = MAX_ROWS
    assert (N - 1) * N + N - 1 <= 2**63 - 1 < N * (N + 1) + N  # Edges: i * num_rows + j of the last pair
    j = torch.tensor([1, 2, 200_000_000, 2_000_000_001, N - 1])
    for i in (torch.zeros_like(j), j // 3, j - 1):
        number = j * (j - 1) // 2 + i
        assert [(int(a), int(b)) for a, b in zip(*pair_of_number(number), strict=True)] == [
            (m - b * (b - 1) // 2, b) for m in number.tolist() for b in [(1 + math.isqrt(1 + 8 * m)) // 2]
        ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Views(4, 1), "V >= 2"),
        (lambda: Views(0, 2), "n >= 1"),
        (lambda: Labels(torch.tensor([0, -1])), "labels >= 0"),
        (lambda: Labels(torch.tensor([0.5])), "integers"),
        (lambda: Labels(torch.empty(0, dtype=torch.long)), "non-empty"),
        (lambda: Edges(torch.tensor([1]), torch.tensor([1]), 3), "pairs of different rows"),
        (lambda: Edges(torch.tensor([0]), torch.tensor([3]), 3), "indices from 0 to 2"),
        (lambda: Edges(torch.tensor([0, 1]), torch.tensor([2]), 3), "equal length"),
        (lambda: Labels(torch.tensor([0, 3]), 3), "labels from 0 to 3: expected 0 to num_classes - 1 = 2"),
        (lambda: Labels(torch.tensor([-1, 2]), 3), "labels from -1 to 2: expected 0 to num_classes - 1 = 2"),
        (lambda: Edges([0], [1], 3_037_000_500), "expected at most 3037000499"),
        (lambda: rewire(Views(4, 2), 1.5, torch.Generator()), "p=1.5: expected a number from 0 to 1"),
        (lambda: Views(4, 2) @ torch.zeros(7, 3), r"expected \(8, K\)"),
    ],
)
def test_relation_rejects_invalid_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Overridden(Views):
    """A subclass may override the product, so its groups are not known."""


@pytest.mark.parametrize(
    "G",
    [
        Views(3, 4),
        Views(3, 2, normalized=True),
        Labels(torch.tensor([2, 0, 2, 5, 0, 2])),
        DegreeNormalized(Labels(torch.tensor([2, 0, 2, 5, 0, 2]))),
    ],
)
def test_groups_are_equal_iff_rows_are_positives(G: Relation) -> None:
    same = G.groups[:, None] == G.groups
    assert torch.equal(same.fill_diagonal_(False), G.dense() > 0)
    assert 0 <= int(G.groups.min()) <= int(G.groups.max()) < G.num_groups


@pytest.mark.parametrize(
    "G",
    [
        Overridden(3, 4),
        DegreeNormalized(Overridden(3, 4)),
        Edges(LEFT, RIGHT, 7),
        ViewExpanded(Labels(torch.tensor([0, 0, 1])), 2),
        WithSupportSet(3, 2, torch.ones(3, 5)),
    ],
)
def test_other_relations_have_no_groups(G: Relation) -> None:
    assert G.groups is None
