"""Closed forms against dense eigensolvers, against descent from many starts, and against other libraries."""

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.manifold import SpectralEmbedding
from torch import Tensor
from torch.testing import assert_close

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
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
from ssl_runner.theory import eigenspaces, measures, optima
from ssl_runner.theory.optima import EXACT, LOWER, UPPER, optimum


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
CROWDED = {  # of high multiplicities, and no cliques
    "paths": PATHS,
    "paths normalized": DegreeNormalized(PATHS),
    "noisy views": rewire(Views(20, 2), 0.2, torch.Generator().manual_seed(0)),
    "star and paths": Edges([0, 0, 0, 0, 5, 6, 8, 9], [1, 2, 3, 4, 6, 7, 9, 10], 13),
}


def matrix(G: Relation, which: str, center: bool) -> Tensor:
    dense = G.dense(torch.float64)
    d, eye, H = (
        dense.sum(1),
        torch.eye(len(dense), dtype=torch.float64),
        torch.eye(len(dense), dtype=torch.float64) - 1 / len(dense),
    )
    if which == "laplacian":
        return d.diag() - dense
    if which == "normalized":
        root = torch.where(d > 0, d.clamp(min=1e-12).rsqrt(), 0)
        return root[:, None] * dense * root
    return H @ dense @ H if center else eye @ dense


@pytest.mark.parametrize("dense_rows", [2000, 0])
@pytest.mark.parametrize(
    "which", ["laplacian", "adjacency", "adjacency centred", "normalized", "normalized centred"]
)
@pytest.mark.parametrize("G", (RELATIONS | CROWDED).values(), ids=RELATIONS | CROWDED)
def test_eigenspaces_are_those_of_the_dense_matrix(
    G: Relation, which: str, dense_rows: int, monkeypatch
) -> None:
    """Values, whole dimensions, projectors and bases; by structure, by the dense solver and by Lanczos."""
    monkeypatch.setattr(spectrum, "DENSE", dense_rows)
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
    taken = optima.take_leading(eigenspaces.spectrum(G, which, k, bool(center)), k)
    leading = expected[:k]
    if which != "laplacian" and dense_rows == 0:  # Lanczos seeks positive ones only
        taken, leading = [pair for pair in taken if pair[0].value > 1e-9], leading[leading > 1e-9]
    assert_close(sign * optima.repeat_values(taken), leading, rtol=1e-8, atol=1e-8)
    for space, q in taken:
        assert space.dim == int((expected - sign * space.value).abs().lt(1e-6).sum())
        full = space.basis(space.dim)
        assert_close(full.T @ full, torch.eye(space.dim, dtype=torch.float64), rtol=0, atol=1e-8)
        assert_close(A @ full, space.value * full, rtol=1e-7, atol=1e-7)
        X = torch.randn(N, 3)
        assert_close(space.project(X), full @ (full.T @ X.double()), rtol=1e-8, atol=1e-8)
        assert_close(space.basis(q), full[:, :q])
        if centred:
            assert (out.T @ full).abs().max() < 1e-8


def descend(loss: Loss, G: Relation, K: int, seed: int) -> float:
    """The lowest value that L-BFGS finds from one random start."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.empty(1).uniform_(-1.5, 0.7, generator=generator).item()
    Z = (scale * torch.randn(G.num_rows, K, generator=generator, dtype=torch.float64)).requires_grad_()
    solver = torch.optim.LBFGS(
        [Z],
        max_iter=3000,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0,
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
]
EXACTS += [
    (SimCLR(tau, reduction), name, K)
    for tau, reduction in ((0.5, "mean"), (0.2, "sum"))
    for name, K in (("views V=2", 5), ("views V=3 normalized", 6), ("balanced labels", 2))
]


@pytest.mark.parametrize(("loss", "name", "K"), EXACTS, ids=lambda case: str(case).partition("(")[0])
def test_descent_reaches_an_exact_value_and_never_beats_it(loss: Loss, name: str, K: int) -> None:
    G = RELATIONS[name]
    best = optimum(loss, G, K)
    assert best.kind == EXACT
    reached = [descend(loss, G, K, seed) for seed in range(4)]
    scale = max(abs(best.value), 1e-3)
    assert min(reached) > best.value - 1e-9 * scale
    assert min(reached) < best.value + 1e-6 * scale


ATTAINED = [(VICReg(2.0, 1.0, gamma, eps=1e-4), K) for gamma in (0.1, 2.0) for K in (3, 14)]
ATTAINED += [(VICReg(2.0, 0.1, 0.5, variance="squared"), 4), (VICReg(2.0, 2.0, 0.5, variance="squared"), 4)]
ATTAINED += [(SpectralContrastive(), 4), (SpectralContrastive("sum", center=True), 14)]
ATTAINED += [(BarlowTwins(0.1, center, eps=1e-12), K) for center in (False, True) for K in (2, 8, 14)]
ATTAINED += [(BarlowTwins(alpha, eps=1e-2), 12) for alpha in (0.005, 3.0)]
ATTAINED += [(SimCLR(0.3), 12), (SimCLR(0.3, "sum"), 14)]


@pytest.mark.parametrize("name", RELATIONS | CROWDED)
@pytest.mark.parametrize(("loss", "K"), ATTAINED)
def test_an_exact_value_or_an_upper_bound_is_attained_by_the_embedding(loss: Loss, K: int, name: str) -> None:
    G = (RELATIONS | CROWDED)[name]
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


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_lower_bound_is_never_beaten(name: str, reduction: str) -> None:
    G, loss = RELATIONS[name], SimCLR(0.3, reduction)
    best = optimum(loss, G, 2)
    assert min(descend(loss, G, 2, seed) for seed in range(3)) >= best.value * (1 - 1e-9)


@pytest.mark.parametrize("name", ["labels", "edges", "noisy"])
def test_descent_does_better_than_an_upper_bound_or_as_well(name: str) -> None:
    G = RELATIONS[name]
    for loss in (VICReg(2.0, 1.0, 2.0), BarlowTwins(1.0)):
        best = optimum(loss, G, 5)
        assert best.kind == UPPER
        assert (
            best.value / 1.5 < min(descend(loss, G, 5, seed) for seed in range(3)) <= best.value * (1 + 1e-6)
        )


@pytest.mark.parametrize("alpha", [0.005, 0.02, 1.0])
def test_barlow_with_more_columns_than_classes_shares_them(alpha: float) -> None:
    """K = 16, 5 classes: C = F'F of a tight frame, off-diagonal K^2 / 5 - K; descent finds nothing much lower."""
    G = Labels(torch.arange(30) % 5)
    best = optimum(BarlowTwins(alpha, eps=1e-12), G, 16)
    assert_close(best.value, min(11.0, alpha * (16**2 / 5 - 16)), rtol=1e-9, atol=0)
    assert best.rank == 5
    reached = min(descend(BarlowTwins(alpha, eps=1e-12), G, 16, seed) for seed in range(2))
    assert 0.9 * best.value < reached <= best.value * (1 + 1e-9)


@pytest.mark.parametrize("name", ["labels", "labels normalized", "edges", "noisy"])
@pytest.mark.parametrize("eps", [1e-4, 1e-2])
def test_the_hinges_scales_minimise_each_decorrelated_column(eps: float, name: str) -> None:
    """Against a fine grid of standard deviations, the eigenvalues from the dense Laplacian."""
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


def test_the_entropy_bound_is_that_of_the_rows() -> None:
    G = RELATIONS["edges"]
    d = G.dense(torch.float64).sum(1)
    assert_close(optimum(SimCLR(0.5, "sum"), G, 4).value, float(torch.special.xlogy(d, d).sum()))
    P = DegreeNormalized(G).dense(torch.float64)
    expected = -torch.special.xlogy(P, P / P.sum(1, keepdim=True).clamp(min=1e-300)).sum()
    assert_close(
        optimum(SimCLR(0.5, "sum"), DegreeNormalized(G), 4).value, float(expected), rtol=1e-6, atol=0
    )


def test_the_rank_follows_gamma_for_vicreg_and_g_for_simclr() -> None:
    """theory.md 4: rank = #{k <= K: gamma (N-1) lambda_k < N alpha}, against the positive eigenvalues of G."""
    G, K, N = RELATIONS["edges"], 10, 12
    values = torch.linalg.eigvalsh(matrix(G, "laplacian", False))[1 : K + 1]
    for gamma in (0.01, 0.3, 1.0, 3.0):
        expected = int((gamma * (N - 1) * values < N * 2.0).sum())
        assert optimum(VICReg(2.0, 2.0, gamma, variance="squared"), G, K).rank == expected
    positive = int((torch.linalg.eigvalsh(G.dense(torch.float64)) > 1e-9).sum())
    assert optimum(SpectralContrastive(), G, 12).rank == positive < 12
    assert optimum(SimCLR(), G, 12).rank == positive


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_eigenvalues_of_zero_add_nothing_to_the_rank(seed: int, center: bool) -> None:
    G = random_pairs(40, 25, seed)
    values = torch.linalg.eigvalsh(matrix(G, "adjacency", center))
    positive = int((values > 1e-9).sum())
    assert int((values > 1e-30).sum()) >= positive
    best = optimum(SpectralContrastive(center=center), G, 39)
    assert best.rank == positive == sum(q for _, q in best.spaces)
    joined = int((G.degrees > 0).sum())
    normalized = torch.linalg.eigvalsh(matrix(G, "normalized", False))
    assert joined > optimum(BarlowTwins(1.0), G, 39).rank == int((normalized > 1e-9).sum())


@pytest.mark.parametrize("G", CROWDED.values(), ids=CROWDED)
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
def test_any_choice_among_tied_eigenvectors_is_aligned(loss: Loss, G: Relation) -> None:
    """The last ones of the matrix's own dense decomposition, in place of those that `optimum` chose."""
    which = {"VICReg": "laplacian", "SpectralContrastive": "adjacency", "BarlowTwins": "normalized"}[
        type(loss).__name__
    ]
    center = getattr(loss, "center", True)
    best = optimum(loss, G, 5)
    scale = best.Z.norm(dim=0)
    chosen = []
    for space, q in optima.take_leading(eigenspaces.spectrum(G, which, 5, center), 5):
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


def test_alignment_sees_what_the_loss_sees() -> None:
    """SimCLR: rows of any norm. Barlow Twins: columns of any scale, and shifted where they are centred."""
    simplex = optimum(SimCLR(), Labels(torch.arange(30) % 3), 4)
    scaled = simplex.Z * torch.rand(30, 1)
    assert_close(measures.alignment(scaled, simplex), 1.0, rtol=0, atol=1e-9)
    assert_close(torch.linalg.svdvals(simplex.seen(scaled)), simplex.singular_values, rtol=1e-9, atol=1e-7)
    G, loss = Labels(UNEVEN), BarlowTwins(0.1, center=True, eps=1e-12)
    best = optimum(loss, G, 3)
    moved = best.Z * torch.tensor([1.0, 5.0, 0.1]) + 3
    assert_close(float(loss(moved, G)), best.value, rtol=1e-6, atol=1e-9)
    assert_close(measures.alignment(moved, best), 1.0, rtol=0, atol=1e-9)


def test_laplacian_eigenmaps_are_sklearns_spectral_embedding() -> None:
    """sklearn's embedding is D^-1/2 times the eigenvectors of the normalised Laplacian: CCA's form here."""
    G = random_pairs(60, 200)
    theirs = SpectralEmbedding(4, affinity="precomputed", random_state=0).fit_transform(
        G.dense(torch.float64).numpy()
    )
    ours = optimum(BarlowTwins(center=True), G, 4).Z
    theirs = torch.from_numpy(theirs)
    theirs = theirs / theirs.square().sum(0).sqrt()
    ours = ours / ours.square().sum(0).sqrt()
    assert_close((theirs * ours).sum(0).abs(), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_structure_spares_the_eigenproblem_of_a_large_relation() -> None:
    """200,000 rows of views and labels; the optimum is theirs without any N x N matrix."""
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
    """The smallest eigenvalue of the Laplacian orthogonal to known vectors (N, r), by LOBPCG."""
    i, j = G.edges().numpy()
    L = scipy.sparse.diags_array(G.degrees.double().numpy()) - scipy.sparse.csr_array(
        (np.ones(len(i)), (i, j)), (G.num_rows,) * 2
    )
    X = np.random.default_rng(1).standard_normal((G.num_rows, 4))
    values, _ = scipy.sparse.linalg.lobpcg(L, X, Y=known.numpy(), largest=False, tol=1e-5, maxiter=400)
    return float(values.min())


@pytest.mark.slow
def test_a_long_path_whose_spectrum_is_crowded_at_its_end_is_solved() -> None:
    """Eigenvalues 2 - 2 cos(pi k / N) of the Laplacian, 2 cos(pi k / (N + 1)) of the adjacency."""
    N = 20_000
    path, k = Edges(torch.arange(N - 1), torch.arange(1, N), N), torch.arange(1, 6, dtype=torch.float64)
    found = optima.repeat_values(optima.take_leading(eigenspaces.spectrum(path, "laplacian", 5), 5))
    assert_close(found, 2 - 2 * (torch.pi * k / N).cos(), rtol=1e-4, atol=1e-12)
    found = optima.repeat_values(optima.take_leading(eigenspaces.spectrum(path, "adjacency", 5), 5))
    assert_close(found, 2 * (torch.pi * k / (N + 1)).cos(), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_a_sparse_relation_of_20000_rows_is_solved_iteratively() -> None:
    G, K = random_pairs(20_000, 100_000), 16
    best = optimum(VICReg(1.0, 1.0, 0.02, variance="squared"), G, K)
    Z = best.Z
    U = Z / Z.square().sum(0).sqrt()
    LU = G.degrees[:, None] * U - G @ U
    values = (U * LU).sum(0)
    assert (LU - U * values).norm(dim=0).max() < 1e-6
    probe = torch.linalg.qr(torch.cat([torch.ones(20_000, 1, dtype=torch.float64), Z], 1))[0]
    lowest = subspace_iteration(G, probe)
    assert lowest > values.max() - 1e-6  # nothing smaller is left
    assert_close(float(VICReg(1.0, 1.0, 0.02, variance="squared")(Z, G)), best.value, rtol=1e-8, atol=0)


def test_a_relation_of_high_multiplicity_without_the_structure_of_cliques_is_decomposed() -> None:
    """260 images twice, classes of 52 rows less one pair each: LAPACK's "evr" gives up on this one."""
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
    random = [measures.alignment(torch.randn(400, 3), labels) for _ in range(20)]
    assert sum(random) / 20 < 0.05  # 3 / 399 on average


def test_label_energy_is_what_least_squares_explains() -> None:
    y = torch.arange(60) % 3
    Y, Z = torch.nn.functional.one_hot(y).double(), torch.randn(60, 5, dtype=torch.float64)
    Yc, Zc = Y - Y.mean(0), Z - Z.mean(0)
    residual = Yc - Zc @ torch.linalg.lstsq(Zc, Yc).solution
    expected = 1 - float(residual.square().sum() / Yc.square().sum())
    for same in (Z, Zc + 100, torch.cat([Zc, Zc], 1), torch.cat([Zc, torch.zeros(60, 90)], 1)):
        assert_close(measures.label_energy(same, Y), expected, rtol=1e-6, atol=0)
    assert measures.label_energy(torch.zeros(60, 4), Y) == 0


def test_the_label_energy_of_a_relation() -> None:
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
    most, mean = measures.label_energy_of_optimum(Y.repeat(2, 1), optimum(VICReg(), Views(60, 2), 3))
    assert_close(most, 1.0, rtol=1e-9, atol=0)
    assert_close(mean, 3 / 59, rtol=1e-9, atol=0)


def test_a_loss_without_a_closed_form_says_so() -> None:
    class Other(Loss):
        def _terms(self, Z, G):
            return {}

    with pytest.raises(NotImplementedError, match="Other has no closed form"):
        optimum(Other(), Views(3, 2), 2)


def test_what_has_no_free_embedding_is_refused() -> None:
    for loss in (VICReg(), SimCLR(), SpectralContrastive(), BarlowTwins()):
        with pytest.raises(ValueError, match="constant rows"):
            optimum(loss, WithSupportSet(4, 2, torch.randn(4, 3)), 2)
        with pytest.raises(ValueError, match="K=0"):
            optimum(loss, Views(4, 2), 0)
        with pytest.raises(ValueError, match="1 row"):
            optimum(loss, Labels(torch.tensor([0])), 2)
        alone = optimum(loss, Labels(torch.arange(4)), 3)
        assert alone.Z is None or alone.Z.shape == (4, 3)


def test_one_group_is_one_point() -> None:
    G, Y = Labels(torch.zeros(4, dtype=torch.long)), torch.nn.functional.one_hot(torch.arange(4) % 2)
    for K in (1, 3):
        best = optimum(SimCLR(), G, K)
        assert (best.kind, best.rank) == (EXACT, 1)
        assert_close(measures.alignment(best.Z, best), 1.0)
        assert measures.label_energy_of_optimum(Y, best) == pytest.approx((0.0, 0.0), abs=1e-12)
