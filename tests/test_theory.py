"""Closed forms compared with dense eigensolvers, descent from several starts, and other libraries."""

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import SpectralEmbedding
from torch import Tensor
from torch.testing import assert_close

from ssl_runner.loss import MMCR, WMSE, BarlowTwins, FroSSL, Loss, SIGReg, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import (
    DegreeNormalized,
    Edges,
    KNearest,
    Labels,
    Relation,
    ViewExpanded,
    Views,
    WithSupportSet,
    rewire,
)
from ssl_runner.theory import EXACT, LOWER, NUMERIC, UPPER, Optimum, eigenspaces, infonce, measures, optimum
from ssl_runner.theory.matrices import centred
from ssl_runner.theory.selection import repeat_values, take_leading
from ssl_runner.theory.whitening import with_fixed_directions
from tests.helpers import is_defined


def random_pairs(N: int, E: int, seed: int = 0) -> Edges:
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randint(N, (2, E), generator=generator)
    return Edges(i[i != j], j[i != j], N)


UNEVEN = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3, 0, 2, 2, 2])
NEAREST = torch.tensor([[1], [2], [0], [4], [3], [3]])
RELATIONS = {
    "views V=2": Views(6, 2),
    "views V=3 normalized": Views(4, 3, normalized=True),
    "labels": Labels(UNEVEN),
    "labels normalized": Labels(UNEVEN, normalized=True),
    "balanced labels": Labels(torch.arange(12) % 3),
    "edges": random_pairs(12, 20),
    "edges apart": Edges([0, 1, 1, 5, 6], [1, 2, 3, 6, 7], 12),
    "neighbors": ViewExpanded(KNearest(NEAREST), 2),
    "neighbors normalized": DegreeNormalized(ViewExpanded(KNearest(NEAREST), 2)),
    "cliques from pairs, normalized": DegreeNormalized(rewire(Labels(UNEVEN), 0.0, torch.Generator())),
    "noisy": rewire(Labels(torch.arange(12) % 3), 0.5, torch.Generator().manual_seed(0)),
}
PATHS = Edges([row for row in range(36) if row % 3 < 2], [row + 1 for row in range(36) if row % 3 < 2], 36)
MULTIPLE = {  # eigenvalues of high multiplicity, but no groups
    "paths": PATHS,
    "paths normalized": DegreeNormalized(PATHS),
    "noisy views": rewire(Views(20, 2), 0.2, torch.Generator().manual_seed(0)),
    "star and paths": Edges([0, 0, 0, 0, 5, 6, 8, 9], [1, 2, 3, 4, 6, 7, 9, 10], 13),
}


def matrix(G: Relation, which: str, center: bool) -> Tensor:
    dense = G.dense(torch.float64)
    d = dense.sum(1)
    if which == "laplacian":
        return d.diag() - dense
    if which == "normalized":
        root = torch.where(d > 0, d.clamp(min=1e-12).rsqrt(), 0)
        return root[:, None] * dense * root
    H = torch.eye(len(dense), dtype=torch.float64) - 1 / len(dense)
    return H @ dense @ H if center else dense


@pytest.mark.parametrize("dense_rows", [2000, 0])
@pytest.mark.parametrize(
    "which", ["laplacian", "adjacency", "adjacency centred", "normalized", "normalized centred"]
)
@pytest.mark.parametrize("G", (RELATIONS | MULTIPLE).values(), ids=RELATIONS | MULTIPLE)
def test_eigenspaces_match_dense_eigensolver(G: Relation, which: str, dense_rows: int, monkeypatch) -> None:
    """Values, dimensions, projectors and bases; by structure, by the dense solver and by Lanczos."""
    monkeypatch.setattr(eigenspaces, "MAX_DENSE_ROWS", dense_rows)
    which, _, center = which.partition(" ")
    centred = bool(center) or which == "laplacian"
    k, N = 5, G.num_rows
    A = matrix(G, which, bool(center))
    out = (
        torch.ones(N, 1, dtype=torch.float64)
        if which != "normalized"
        else G.dense(torch.float64).sum(1).sqrt()[:, None]
    )
    sign = -1 if which == "laplacian" else 1
    P = (
        torch.eye(N, dtype=torch.float64) - out @ out.T / out.square().sum()
        if centred
        else torch.eye(N, dtype=torch.float64)
    )
    if which == "normalized":
        P = P * (G.degrees > 0)[:, None] * (G.degrees > 0)
    expected = torch.linalg.eigvalsh(P @ (sign * A + 20 * torch.eye(N)) @ P).flip(0) - 20
    selection = take_leading(eigenspaces.leading_eigenspaces(G, which, k, bool(center)), k)
    leading = expected[:k]
    if which != "laplacian" and dense_rows == 0:  # Lanczos returns positive eigenvalues only
        selection, leading = [pair for pair in selection if pair[0].value > 1e-9], leading[leading > 1e-9]
    assert_close(sign * repeat_values(selection), leading, rtol=1e-8, atol=1e-8)
    for space, q in selection:
        assert space.dim == int((expected - sign * space.value).abs().lt(1e-6).sum())
        basis = space.basis(space.dim)
        assert_close(basis.T @ basis, torch.eye(space.dim, dtype=torch.float64), rtol=0, atol=1e-8)
        assert_close(A @ basis, space.value * basis, rtol=1e-7, atol=1e-7)
        X = torch.randn(N, 3)
        assert_close(space.project(X), basis @ (basis.T @ X.double()), rtol=1e-8, atol=1e-8)
        assert_close(space.basis(q), basis[:, :q])
        if centred:
            assert (out.T @ basis).abs().max() < 1e-8


def descend(loss: Loss, G: Relation, K: int, seed: int, steps: int = 3000) -> float:
    """Lowest loss that L-BFGS finds from one random start."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.empty(1).uniform_(-1.5, 0.7, generator=generator).item()
    Z = (scale * torch.randn(G.num_rows, K, generator=generator, dtype=torch.float64)).requires_grad_()
    solver = torch.optim.LBFGS(
        [Z],
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = loss(Z, G)
        value.backward()
        return value

    solver.step(objective)
    return float(loss(Z.detach(), G))


EXACTS = [
    (VICReg(2.0, 2.0, gamma, variance="squared"), name, K)
    for gamma in (0.1, 1.0)
    for name in (
        "views V=2",
        "labels",
        "labels normalized",
        "edges",
        "edges apart",
        "neighbors",
        "neighbors normalized",
    )
    for K in (3, 14)
]
EXACTS += [(VICReg(2.0, 5.0, 0.5, variance="squared"), name, 4) for name in ("labels", "edges")]
EXACTS += [
    (SpectralContrastive(reduction, center), name, K)
    for reduction, center in (("sum", False), ("mean", False), ("mean", True))
    for name in ("views V=2", "labels", "labels normalized", "edges", "neighbors normalized")
    for K in (3, 14)
    if center or (name, K) != ("edges", 14)
]
SLOW = [(SpectralContrastive(reduction), "edges", 14) for reduction in ("sum", "mean")]  # L-BFGS takes 5 s
EXACTS += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
EXACTS += [
    (SimCLR(tau, reduction), name, K)
    for tau, reduction in ((0.5, "mean"), (0.2, "sum"))
    for name, K in (("views V=2", 5), ("views V=3 normalized", 6), ("balanced labels", 2))
]
EXACTS += [
    (SimCLR(0.5, denominator="negatives"), "views V=2", 5),
    (SimCLR(0.3, "sum", "negatives"), "balanced labels", 2),
    (MMCR(), "views V=2", 3),
    (MMCR(), "views V=2", 9),
    (MMCR(), "labels", 3),
    (FroSSL(0.25), "views V=2", 3),
    (FroSSL(0.25), "views V=3 normalized", 12),
    (FroSSL(2.0), "views V=3 normalized", 12),
    (FroSSL(0.05), "balanced labels", 14),
    (FroSSL(per_view=True), "views V=3 normalized", 6),
]
EXACTS += [
    (WMSE(unit_rows=False), name, 3) for name in ("views V=2", "labels normalized", "edges", "neighbors")
]
EXACTS += [(WMSE(), "views V=2", 3)]


@pytest.mark.parametrize(("loss", "name", "K"), EXACTS, ids=lambda case: str(case).partition("(")[0])
def test_exact_optimum_is_reached_but_not_beaten_by_descent(loss: Loss, name: str, K: int) -> None:
    G = RELATIONS[name]
    best = optimum(loss, G, K)
    assert best.kind == EXACT
    scale = max(abs(best.value), 1e-3)
    reached: list[float] = []
    while len(reached) < 2 or (min(reached) >= best.value + 1e-6 * scale and len(reached) < 4):
        reached.append(descend(loss, G, K, seed=len(reached)))
    assert min(reached) > best.value - 1e-9 * scale
    assert min(reached) < best.value + 1e-6 * scale


ATTAINED = [(VICReg(2.0, 1.0, gamma, eps=1e-4), K) for gamma in (0.1, 2.0) for K in (3, 14)]
ATTAINED += [(VICReg(2.0, 0.1, 0.5, variance="squared"), 4), (VICReg(2.0, 2.0, 0.5, variance="squared"), 4)]
ATTAINED += [(SpectralContrastive(), 4), (SpectralContrastive("sum", center=True), 14)]
ATTAINED += [(BarlowTwins(0.1, center, eps=1e-12), K) for center in (False, True) for K in (2, 8, 14)]
ATTAINED += [(BarlowTwins(alpha, eps=1e-2), 12) for alpha in (0.005, 3.0)]
ATTAINED += [(SimCLR(0.3), 12), (SimCLR(0.3, "sum"), 14), (SimCLR(0.3, denominator="negatives"), 12)]
ATTAINED += [(MMCR(alpha), K) for alpha in (0.0, 0.5) for K in (2, 8)]
ATTAINED += [(FroSSL(gamma), K) for gamma in (0.0, 0.2) for K in (2, 14)] + [(FroSSL(per_view=True), 5)]
ATTAINED += [(WMSE(), 3), (WMSE(unit_rows=False), 8), (WMSE(whitening_size=4), 3)]
ATTAINED += [
    (with_fixed_directions(SIGReg(1.0, gamma, directions=20)), K) for gamma in (0.01, 10.0) for K in (3, 14)
]


@pytest.mark.parametrize(
    ("loss", "K", "name"),
    [
        (loss, K, name)
        for loss, K in ATTAINED
        for name, G in (RELATIONS | MULTIPLE).items()
        if is_defined(loss, G)
    ],
)
def test_embedding_attains_exact_value_or_upper_bound(loss: Loss, K: int, name: str) -> None:
    G = (RELATIONS | MULTIPLE)[name]
    best = optimum(loss, G, K)
    if best.kind == LOWER:
        assert best.Z is None
        return
    assert best.Z.shape == (G.num_rows, K)
    assert_close(float(loss(best.Z, G)), best.value, rtol=1e-9, atol=1e-9)
    singular_values = torch.linalg.svdvals(best.Z)
    assert_close(singular_values, best.singular_values[: len(singular_values)], rtol=1e-7, atol=1e-7)
    assert_close(torch.linalg.svdvals(best.canonicalize(best.Z)), singular_values, rtol=1e-6, atol=1e-6)
    assert_close(
        measures.alignment(best.Z, best),
        1.0 if best.spaces and singular_values.any() else 0.0,
        rtol=0,
        atol=1e-9,
    )
    assert best.rank == int(torch.linalg.matrix_rank(best.Z))


def test_bound_of_sigreg_does_not_depend_on_the_step() -> None:
    """A resumed run computes it again, with a loss that has drawn other directions."""
    loss, G = SIGReg(directions=8), RELATIONS["views V=2"]
    state = loss.counter.state.clone()
    first = optimum(loss, G, 3)
    assert torch.equal(loss.counter.state, state)
    loss.counter.state += 1
    assert optimum(loss, G, 3).value == first.value
    assert torch.equal(optimum(loss, G, 3).Z, first.Z)


@pytest.mark.parametrize("name", ["labels", "edges"])
@pytest.mark.parametrize("loss", [WMSE(), WMSE(whitening_size=6)], ids=["unit rows", "blocks"])
def test_bound_of_wmse_has_no_eigenspaces(loss: WMSE, name: str) -> None:
    best = optimum(loss, RELATIONS[name], 5)
    assert (best.kind, best.value, best.rank) == (LOWER, 0.0, None)
    assert measures.alignment(torch.randn(12, 5), best) is None


class Weighted(Views):
    """Views with other weights: its groups are those of Views, and its eigenspaces are not known."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.scale = torch.rand(6).repeat(2)
        self.degrees = self.degrees * self.scale

    def __matmul__(self, Z: Tensor) -> Tensor:
        return self.scale.to(Z)[:, None] * super().__matmul__(Z)

    @property
    def groups(self) -> Tensor:
        return torch.arange(6).repeat(2)

    def weights(self) -> Tensor:
        return self.scale.double()


def test_bound_of_decoupled_simclr_holds_for_groups_with_weights() -> None:
    loss, G = SimCLR(0.5, denominator="negatives"), Weighted()
    best = optimum(loss, G, 3)
    assert best.kind == LOWER
    assert descend(loss, G, 3, 0) >= best.value - 1e-9


@pytest.mark.parametrize("name", RELATIONS)
def test_lower_bound_is_not_beaten_by_descent(name: str) -> None:
    G, loss = RELATIONS[name], SimCLR(0.3)
    best = optimum(loss, G, 2)
    assert min(descend(loss, G, 2, seed) for seed in range(2)) >= best.value * (1 - 1e-9)
    assert_close(optimum(SimCLR(0.3, "sum"), G, 2).value, best.value * float(G.degrees.sum()))


BOUNDED = [
    (SimCLR(0.3, denominator="negatives"), "views V=2", 3),
    (SimCLR(0.3, denominator="negatives"), "labels", 4),
    (FroSSL(0.25), "views V=2", 8),
    (FroSSL(0.05), "balanced labels", 5),
    (FroSSL(0.25), "labels", 3),
    (FroSSL(0.25), "edges", 4),
    (FroSSL(per_view=True), "neighbors", 3),
]


@pytest.mark.parametrize(("loss", "name", "K"), BOUNDED)
def test_lower_bound_of_decoupled_simclr_and_frossl_is_not_beaten(loss: Loss, name: str, K: int) -> None:
    best = optimum(loss, RELATIONS[name], K)
    assert best.kind == LOWER
    assert descend(loss, RELATIONS[name], K, 0) >= best.value - 1e-9


@pytest.mark.parametrize(("gamma", "rank"), [(0.25, 16), (0.49, 16), (0.51, 8), (FroSSL().gamma, 8)])
def test_frossl_with_small_gamma_separates_positives(gamma: float, rank: int) -> None:
    """8 images, 2 views: rank 8 if the views of an image are equal. At p = 1, the share of G's leading
    eigenspace, d/dp [log(p^2 + (1 - p)^2) + 4 gamma (1 - p)] = 2 - 4 gamma changes its sign at gamma = 1/2.
    """
    assert optimum(FroSSL(gamma), Views(8, 2), 64).rank == rank


@pytest.mark.parametrize("K", [2, 4, 6])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_mmcr_with_manifolds_is_not_lower_near_its_optimum(scale: float, K: int) -> None:
    """Not by descent: equal views are where the nuclear norm of a group is not differentiable."""
    loss, G = MMCR(0.7), RELATIONS["views V=3 normalized"]
    best = optimum(loss, G, K)
    values = [float(loss(best.Z + scale * torch.randn(12, K), G)) for _ in range(20)]
    assert best.value < min(values) < best.value + 10 * scale


@pytest.mark.parametrize(
    "name", ["labels", *(pytest.param(name, marks=pytest.mark.slow) for name in ("edges", "noisy"))]
)
def test_upper_bound_is_reached_or_beaten_by_descent(name: str) -> None:
    G = RELATIONS[name]
    for loss in (VICReg(2.0, 1.0, 2.0), BarlowTwins(1.0)):
        best = optimum(loss, G, 5)
        assert best.kind == UPPER
        assert (
            best.value / 1.5 < min(descend(loss, G, 5, seed) for seed in range(3)) <= best.value * (1 + 1e-6)
        )


@pytest.mark.parametrize("alpha", [0.005, 0.02, 1.0])
def test_barlow_optimum_with_more_columns_than_classes_is_tight_frame(alpha: float) -> None:
    """K = 16, 5 classes: C = F'F, off-diagonal sum K^2 / 5 - K. Descent gets at most 10 % lower."""
    G = Labels(torch.arange(30) % 5)
    best = optimum(BarlowTwins(alpha, eps=1e-12), G, 16)
    assert_close(best.value, min(11.0, alpha * (16**2 / 5 - 16)), rtol=1e-9, atol=0)
    assert best.rank == 5
    reached = min(descend(BarlowTwins(alpha, eps=1e-12), G, 16, seed) for seed in range(2))
    assert 0.9 * best.value < reached <= best.value * (1 + 1e-9)


@pytest.mark.parametrize("name", ["labels", "labels normalized", "edges", "noisy"])
@pytest.mark.parametrize("eps", [1e-4, 1e-2])
def test_hinge_scales_minimise_each_column(eps: float, name: str) -> None:
    """Compared with a fine grid of standard deviations, for eigenvalues of the dense Laplacian."""
    G, loss, K = RELATIONS[name], VICReg(2.0, 1.0, 2.0, eps=eps), 8
    values = torch.linalg.eigvalsh(matrix(G, "laplacian", False))[1 : K + 1]
    s = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    costs = [
        2 * (1 - (s**2 + eps).sqrt()).relu() + 2 * 2 * 11 / 12 * value * s**2 for value in values.clamp(min=0)
    ]
    best = optimum(loss, G, K)
    assert_close(best.value, float(sum(cost.min() for cost in costs)), rtol=1e-7, atol=1e-7)
    at = torch.stack([s[cost.argmin()] for cost in costs])
    assert_close(best.singular_values, 11**0.5 * at.sort(descending=True).values, rtol=0, atol=1e-3)


def test_simclr_lower_bound_of_many_rows_is_row_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infonce, "MAX_ROWS", 11)
    G = RELATIONS["edges"]
    best = optimum(SimCLR(0.5), G, 4)
    assert (best.kind, best.rank, best.Z, measures.alignment(torch.randn(12, 4), best)) == (
        LOWER,
        *[None] * 3,
    )
    assert measures.label_energy_of_optimum(torch.randn(12, 2), best) == (None, None)
    d = G.dense(torch.float64).sum(1)
    assert_close(optimum(SimCLR(0.5, "sum"), G, 4).value, float(torch.special.xlogy(d, d).sum()))
    P = DegreeNormalized(G).dense(torch.float64)
    expected = -torch.special.xlogy(P, P / P.sum(1, keepdim=True).clamp(min=1e-300)).sum()
    assert_close(
        optimum(SimCLR(0.5, "sum"), DegreeNormalized(G), 4).value, float(expected), rtol=1e-6, atol=0
    )


def test_closed_form_rank_follows_gamma_for_vicreg_and_eigenvalues_for_spectral() -> None:
    """VICReg: rank = #{k <= K: gamma (N-1) lambda_k < N alpha}. Spectral: number of positive eigenvalues."""
    G, K, N = RELATIONS["edges"], 10, 12
    values = torch.linalg.eigvalsh(matrix(G, "laplacian", False))[1 : K + 1]
    for gamma in (0.01, 0.3, 1.0, 3.0):
        expected = int((gamma * (N - 1) * values < N * 2.0).sum())
        assert optimum(VICReg(2.0, 2.0, gamma, variance="squared"), G, K).rank == expected
    positive = int((torch.linalg.eigvalsh(G.dense(torch.float64)) > 1e-9).sum())
    assert optimum(SpectralContrastive(), G, 12).rank == positive < 12


STAR = Edges(torch.zeros(6, dtype=torch.long), torch.arange(1, 7), 7)
PATH = Edges(torch.arange(7), torch.arange(1, 8), 8)
UNEQUAL = Labels(torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3]))
INFONCE_RANKS = [(STAR, 0.05, 6), (STAR, 2.0, 6), (PATH, 0.1, 4), (PATH, 0.5, 3), (PATH, 2.0, 2)]
INFONCE_RANKS += [(UNEQUAL, 0.1, 3), (UNEQUAL, 0.5, 3), (UNEQUAL, 2.0, 2)]


@pytest.mark.parametrize(("G", "tau", "rank"), INFONCE_RANKS)
def test_rank_of_simclr_depends_on_tau_and_its_value_is_certified(G: Relation, tau: float, rank: int) -> None:
    """Its squared form has rank 1 on the star, 4 on the path and 3 on the labels, for every tau."""
    loss, N = SimCLR(tau, "sum"), G.num_rows
    best = optimum(loss, G, N)
    assert (best.kind, best.rank) == (NUMERIC, rank)
    assert optimum(SpectralContrastive(), G, N).rank == {STAR: 1, PATH: 4, UNEQUAL: 3}[G]
    assert_close(float(loss(best.Z, G)), best.value)
    found = infonce.infonce_minimum(G.dense(torch.float64).numpy(), tau, N)
    assert found.attained
    assert found.bound - 1e-9 <= descend(loss, G, N, 0, steps=100)
    assert_close(optimum(SimCLR(tau), G, N).value, best.value / float(G.degrees.sum()))


@pytest.mark.parametrize(("alpha", "rank"), [(0.005, 1), (0.05, 4), (0.5, 4)])
def test_rank_of_barlow_closed_form_depends_on_alpha(alpha: float, rank: int) -> None:
    """4 eigenvalues of the path are positive, and the surplus of K = 6 is cheaper in fewer dimensions."""
    assert optimum(BarlowTwins(alpha), PATH, 6).rank == rank
    assert optimum(SpectralContrastive(), PATH, 6).rank == 4


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_rank_of_simclr_on_equal_groups_is_one_less_than_the_spectral_loss(tau: float) -> None:
    G = Labels(torch.arange(15) % 5)
    found = infonce.infonce_minimum(G.dense(torch.float64).numpy(), tau, 7)
    assert np.linalg.matrix_rank(found.Z, tol=1e-3) == optimum(SimCLR(tau), G, 7).rank == 4
    assert [optimum(SpectralContrastive(center=center), G, 7).rank for center in (False, True)] == [5, 4]


def test_closed_form_of_hinge_vicreg_is_beaten_where_columns_correlate() -> None:
    G, loss = RELATIONS["labels"], VICReg(2.0, 2.0, 2.0)
    best = optimum(loss, G, 5)
    assert best.kind == UPPER
    assert 0.85 * best.value < min(descend(loss, G, 5, seed) for seed in range(2)) < 0.95 * best.value


def test_numeric_optimum_of_equal_groups_is_the_simplex() -> None:
    G = Labels(torch.arange(20) % 5)
    simplex = optimum(SimCLR(0.3, "sum"), G, 6)
    found = infonce.infonce_minimum(G.dense(torch.float64).numpy(), 0.3, 6)
    assert simplex.kind == EXACT
    assert_close(found.value, simplex.value, rtol=1e-6, atol=0)
    assert found.bound <= simplex.value * (1 + 1e-9)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_closed_form_rank_ignores_eigenvalues_at_rounding_level(seed: int, center: bool) -> None:
    G = random_pairs(40, 25, seed)
    values = torch.linalg.eigvalsh(matrix(G, "adjacency", center))
    positive = int((values > 1e-9).sum())
    assert int((values > 1e-30).sum()) >= positive
    best = optimum(SpectralContrastive(center=center), G, 39)
    assert best.rank == positive == sum(q for _, q in best.spaces)
    joined = int((G.degrees > 0).sum())
    normalized = torch.linalg.eigvalsh(matrix(G, "normalized", False))
    assert joined > optimum(BarlowTwins(1.0), G, 39).rank == int((normalized > 1e-9).sum())


@pytest.mark.parametrize("G", MULTIPLE.values(), ids=MULTIPLE)
@pytest.mark.parametrize(
    "loss",
    [
        VICReg(1.0, 1.0, 0.1, variance="squared"),
        SpectralContrastive(),
        SpectralContrastive(center=True),
        BarlowTwins(1.0, eps=1e-12),
        BarlowTwins(1.0, True, eps=1e-12),
    ],
    ids=["vicreg", "simclr", "simclr centred", "barlow", "barlow centred"],
)
def test_alignment_is_one_for_any_choice_of_tied_eigenvectors(loss: Loss, G: Relation) -> None:
    """Random bases of the eigenspaces, in place of those that `optimum` uses."""
    which = {"VICReg": "laplacian", "SpectralContrastive": "adjacency", "BarlowTwins": "normalized"}[
        type(loss).__name__
    ]
    center = getattr(loss, "center", True)
    best = optimum(loss, G, 5)
    scale = best.Z.norm(dim=0)
    chosen = []
    for space, q in take_leading(eigenspaces.leading_eigenspaces(G, which, 5, center), 5):
        chosen.append(
            space.basis(space.dim) @ torch.linalg.qr(torch.randn(space.dim, q, dtype=torch.float64))[0]
        )
    other = torch.cat(chosen, 1)
    if which == "normalized":
        d = G.dense(torch.float64).sum(1)
        other = torch.where(d > 0, d.clamp(min=1e-12).rsqrt(), 0)[:, None] * other
    else:
        other = other * scale
    assert_close(float(loss(other, G)), best.value, rtol=1e-6, atol=1e-9)
    assert_close(measures.alignment(other, best), 1.0, rtol=0, atol=1e-9)


def test_alignment_has_invariances_of_loss() -> None:
    """SimCLR: norms of rows. Barlow Twins: scales of columns, and their mean if the loss centres."""
    simplex = optimum(SimCLR(), Labels(torch.arange(30) % 3), 4)
    scaled = simplex.Z * torch.rand(30, 1)
    assert_close(measures.alignment(scaled, simplex), 1.0, rtol=0, atol=1e-9)
    assert_close(
        torch.linalg.svdvals(simplex.canonicalize(scaled)), simplex.singular_values, rtol=1e-9, atol=1e-7
    )
    G, loss = Labels(UNEVEN), BarlowTwins(0.1, center=True, eps=1e-12)
    best = optimum(loss, G, 3)
    moved = best.Z * torch.tensor([1.0, 5.0, 0.1]) + 3
    assert_close(float(loss(moved, G)), best.value, rtol=1e-6, atol=1e-9)
    assert_close(measures.alignment(moved, best), 1.0, rtol=0, atol=1e-9)


def test_barlow_optimum_matches_sklearn_spectral_embedding() -> None:
    """sklearn returns D^-1/2 times the eigenvectors of the normalised Laplacian."""
    G = random_pairs(60, 200)
    theirs = SpectralEmbedding(4, affinity="precomputed", random_state=0).fit_transform(
        G.dense(torch.float64).numpy()
    )
    ours = optimum(BarlowTwins(center=True), G, 4).Z
    theirs = torch.from_numpy(theirs)
    theirs = theirs / theirs.square().sum(0).sqrt()
    ours = ours / ours.square().sum(0).sqrt()
    assert_close((theirs * ours).sum(0).abs(), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_optimum_of_200000_rows_uses_group_structure() -> None:
    """Views and labels need no N x N matrix."""
    views, labels = Views(100_000, 2), Labels(torch.arange(200_000) % 10, normalized=True)
    for loss in (VICReg(variance="squared"), SimCLR(), SpectralContrastive(), BarlowTwins()):
        best = optimum(loss, views, 16)
        assert best.rank == 16
        assert optimum(loss, labels, 16).rank >= 9
    uneven = Labels(torch.arange(200_000).sqrt().long() % 50, normalized=True)
    d, n = uneven.degrees.double(), torch.bincount(uneven.y)[uneven.y].double()
    assert_close(
        optimum(SimCLR(reduction="sum"), uneven, 16).value,
        float((d * (n - 1).log()).sum()),
        rtol=1e-9,
        atol=0,
    )
    sevenths = Labels(torch.arange(200_000) % 7)
    n = torch.bincount(sevenths.y).double()
    best = optimum(SpectralContrastive("sum"), sevenths, 16)
    assert_close(best.value, float((n * (n - 1) - (n - 1) ** 2).sum()), rtol=1e-9, atol=0)
    singles = Labels(torch.cat([torch.zeros(5), torch.ones(3), torch.arange(2, 20_000)]).long())
    assert optimum(SpectralContrastive(center=True), singles, 16).rank == 2
    Z = optimum(VICReg(), views, 16).Z
    assert_close(float(VICReg()(Z, views)), 0.0, rtol=0, atol=1e-8)


def subspace_iteration(G: Edges, known: Tensor) -> float:
    """Smallest eigenvalue of the Laplacian orthogonal to known vectors (N, r), by LOBPCG."""
    i, j = G.edges().numpy()
    L = scipy.sparse.diags_array(G.degrees.double().numpy()) - scipy.sparse.csr_array(
        (np.ones(len(i)), (i, j)), (G.num_rows,) * 2
    )
    X = np.random.default_rng(1).standard_normal((G.num_rows, 4))
    values, _ = scipy.sparse.linalg.lobpcg(L, X, Y=known.numpy(), largest=False, tol=1e-5, maxiter=400)
    return float(values.min())


@pytest.mark.slow
def test_lanczos_solves_long_path() -> None:
    """Eigenvalues 2 - 2 cos(pi k / N) of the Laplacian and 2 cos(pi k / (N + 1)) of G: dense at the end."""
    N = 8_000
    path, k = Edges(torch.arange(N - 1), torch.arange(1, N), N), torch.arange(1, 6, dtype=torch.float64)
    found = repeat_values(take_leading(eigenspaces.leading_eigenspaces(path, "laplacian", 5), 5))
    assert_close(found, 2 - 2 * (torch.pi * k / N).cos(), rtol=1e-4, atol=1e-12)
    found = repeat_values(take_leading(eigenspaces.leading_eigenspaces(path, "adjacency", 5), 5))
    assert_close(found, 2 * (torch.pi * k / (N + 1)).cos(), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_lanczos_solves_sparse_relation_of_20000_rows() -> None:
    G, K = random_pairs(20_000, 100_000), 16
    best = optimum(VICReg(1.0, 1.0, 0.02, variance="squared"), G, K)
    Z = best.Z
    U = Z / Z.square().sum(0).sqrt()
    LU = G.degrees[:, None] * U - G @ U
    values = (U * LU).sum(0)
    assert (LU - U * values).norm(dim=0).max() < 1e-6
    probe = torch.linalg.qr(torch.cat([torch.ones(20_000, 1, dtype=torch.float64), Z], 1))[0]
    lowest = subspace_iteration(G, probe)
    assert lowest > values.max() - 1e-6  # no smaller eigenvalue was missed
    assert_close(float(VICReg(1.0, 1.0, 0.02, variance="squared")(Z, G)), best.value, rtol=1e-8, atol=0)


def test_optimum_of_near_groups_with_high_multiplicity() -> None:
    """Classes of 52 rows less one pair each: LAPACK's "evr" driver fails on this matrix."""
    i, j = Labels(torch.arange(520) % 10).edges()
    G = DegreeNormalized(Edges(i[i < j][10:], j[i < j][10:], 520))
    best = optimum(SpectralContrastive(), G, 64)
    true = torch.linalg.eigvalsh(G.dense(torch.float64)).flip(0)[:64].clamp(min=0)
    assert_close(best.singular_values, (true * 520**2 / float(G.degrees.sum())).sqrt(), rtol=1e-6, atol=1e-5)


def test_alignment_is_one_at_the_optimum_and_small_at_random() -> None:
    y = torch.arange(400) % 4
    for G in (Views(200, 2), Labels(y), rewire(Labels(y), 0.3, torch.Generator().manual_seed(0))):
        for loss in (VICReg(1.0, 1.0, 1e-3, variance="squared"), SpectralContrastive(), BarlowTwins()):
            best = optimum(loss, G, 3)
            rotated = best.Z @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
            assert_close(measures.alignment(rotated, best), 1.0, rtol=1e-9, atol=0)
    labels = optimum(VICReg(), Labels(y), 3)
    at_random = [measures.alignment(torch.randn(400, 3), labels) for _ in range(20)]
    assert sum(at_random) / 20 < 0.05  # 3 / 399 on average


def test_label_energy_matches_least_squares() -> None:
    y = torch.arange(60) % 3
    Y, Z = torch.nn.functional.one_hot(y).double(), torch.randn(60, 5, dtype=torch.float64)
    Yc, Zc = Y - Y.mean(0), Z - Z.mean(0)
    residual = Yc - Zc @ torch.linalg.lstsq(Zc, Yc).solution
    expected = 1 - float(residual.square().sum() / Yc.square().sum())
    for same in (Z, Zc + 100, torch.cat([Zc, Zc], 1), torch.cat([Zc, torch.zeros(60, 90)], 1)):
        U, _ = measures.left_singular_vectors(centred(same))
        assert_close(measures.label_energy(U, Y), expected, rtol=1e-6, atol=0)
    U, _ = measures.left_singular_vectors(torch.zeros(60, 4))
    assert measures.label_energy(U, Y) == 0


def test_classes_on_a_circle_are_separated_by_a_linear_map_of_low_label_energy() -> None:
    """Rank and label energy bound least squares, not classification: 2 of 9 directions suffice here."""
    y = torch.arange(100) % 10
    angles = 2 * torch.pi * y.double() / 10
    Z = torch.stack([angles.cos(), angles.sin()], 1)
    U, values = measures.left_singular_vectors(Z)
    assert len(values) == 2
    assert measures.label_energy(U, torch.nn.functional.one_hot(y).double()) == pytest.approx(2 / 9)
    assert LogisticRegression(C=1e4).fit(Z.numpy(), y.numpy()).score(Z.numpy(), y.numpy()) == 1


def test_label_energy_of_optimum_depends_on_relation() -> None:
    y = torch.arange(60) % 3
    Y = torch.nn.functional.one_hot(y)
    for loss in (VICReg(), SimCLR(), BarlowTwins()):
        assert_close(
            measures.label_energy_of_optimum(Y, optimum(loss, Labels(y), 3))[0], 1.0, rtol=1e-9, atol=0
        )
        assert (
            measures.label_energy_of_optimum(Y, optimum(loss, Labels(torch.arange(60) % 20 // 4), 3))[0] < 0.2
        )
    assert measures.label_energy_of_optimum(Y, optimum(SimCLR(), Labels(y), 2)) == pytest.approx((1.0, 1.0))
    maximum, mean = measures.label_energy_of_optimum(Y.repeat(2, 1), optimum(VICReg(), Views(60, 2), 3))
    assert_close(maximum, 1.0, rtol=1e-9, atol=0)
    assert_close(mean, 3 / 59, rtol=1e-9, atol=0)


def test_optimum_of_unregistered_loss_raises() -> None:
    class Other(Loss):
        def _terms(self, Z, G):
            return {}

    with pytest.raises(NotImplementedError, match=r"Other has no closed form.*theory\.optimum\.register"):
        optimum(Other(), Views(3, 2), 2)


class WithoutCovariance(VICReg):
    """Has a lower minimum than VICReg: all columns may be equal."""

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return super()._terms(Z, G) | {"covariance": Z.new_zeros(())}


def test_optimum_is_not_inherited_by_subclass() -> None:
    G, K = Views(8, 2), 10
    parent, loss = VICReg(variance="squared", beta=25.0), WithoutCovariance(variance="squared", beta=25.0)
    floor = optimum(parent, G, K)
    assert floor.kind == EXACT
    assert descend(loss, G, K, seed=0) < 1e-6 < floor.value
    with pytest.raises(NotImplementedError, match="WithoutCovariance has no closed form"):
        optimum(loss, G, K)


def test_optimum_uses_function_registered_for_custom_loss() -> None:
    class UnitNorm(Loss):
        def __init__(self) -> None:
            super().__init__()
            self.weights = {"norm": 1.0}

        def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
            return {"norm": (Z.square().sum(1) - 1).square().sum()}

    @optimum.register
    def unit_norm_optimum(loss: UnitNorm, G: Relation, K: int) -> Optimum:
        return Optimum("unit rows", EXACT, 0.0, torch.zeros(K), [], lambda Z: Z, None)

    assert optimum.registered(UnitNorm)
    best = optimum(UnitNorm(), Views(3, 2), 2)
    assert (best.form, best.value) == ("unit rows", 0.0)
    assert not optimum.registered(type("Child", (UnitNorm,), {}))
    with pytest.raises(TypeError, match="annotation of the first parameter"):
        optimum.register(lambda loss, G, K: None)


def test_optimum_raises_for_support_set_no_columns_or_one_row() -> None:
    for loss in (VICReg(), SimCLR(), SpectralContrastive(), BarlowTwins()):
        with pytest.raises(ValueError, match="constant rows"):
            optimum(loss, WithSupportSet(4, 2, torch.randn(4, 3)), 2)
        with pytest.raises(ValueError, match="K=0"):
            optimum(loss, Views(4, 2), 0)
        with pytest.raises(ValueError, match="1 row"):
            optimum(loss, Labels(torch.tensor([0])), 2)
        alone = optimum(loss, Labels(torch.arange(4)), 3)
        assert alone.Z is None or alone.Z.shape == (4, 3)


def test_simclr_optimum_of_one_group_is_one_point() -> None:
    G, Y = Labels(torch.zeros(4, dtype=torch.long)), torch.nn.functional.one_hot(torch.arange(4) % 2)
    for K in (1, 3):
        best = optimum(SimCLR(), G, K)
        assert (best.kind, best.rank) == (EXACT, 1)
        assert_close(measures.alignment(best.Z, best), 1.0)
        assert measures.label_energy_of_optimum(Y, best) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("gamma", [pytest.param(0.0, marks=pytest.mark.slow), 0.1, 100.0])
def test_sigreg_bound_is_between_zero_and_descent(gamma: float) -> None:
    """L-BFGS on free Z from two starts. In one dimension and without invariance it almost reaches 0."""
    G, loss = RELATIONS["edges"], SIGReg(1.0, gamma, directions=10).eval()
    bound = optimum(loss, G, 3)
    assert bound.kind == UPPER
    reached = min(descend(loss, G, 3, seed, steps=300) for seed in range(2))
    assert 0 < reached < bound.value
    if gamma == 0:
        assert 0 < min(descend(loss, G, 1, seed, steps=300) for seed in range(4)) < 1e-3


def test_sigreg_collapses_if_invariance_outweighs() -> None:
    connected = Edges(torch.arange(11), torch.arange(1, 12), 12)
    spread, collapsed = (optimum(SIGReg(1.0, gamma, 20).eval(), connected, 3) for gamma in (1e-3, 1e3))
    assert (spread.rank, collapsed.rank) == (3, 0)
    weights = torch.linspace(-3, 3, 33, dtype=torch.float64)
    phi = (-weights.square() / 2).exp()
    assert_close(collapsed.value, 12 * float(torch.trapezoid((1 - phi).square() * phi, weights)))


def test_wmse_refuses_more_columns_than_it_can_whiten() -> None:
    with pytest.raises(ValueError, match="K=12: expected less than the 12 rows"):
        optimum(WMSE(), RELATIONS["edges"], 12)
