"""Closed forms against dense eigensolvers, against descent from many starts, and against other libraries."""

import pytest
import torch
from sklearn.manifold import SpectralEmbedding
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import spectrum, theory
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SquaredSimCLR, VICReg
from ssl_runner.relation import Edges, Labels, Nearest, Normalized, Originals, Relation, Views, noisy
from ssl_runner.theory import EXACT, LOWER, UPPER, optimum


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
    "neighbors": Originals(Nearest(NEAREST), 2),
    "neighbors normalized": Normalized(Originals(Nearest(NEAREST), 2)),
    "cliques from pairs, normalized": Normalized(noisy(Labels(UNEVEN), 0.0, torch.Generator())),
    "noisy": noisy(Labels(torch.arange(12) % 3), 0.5, torch.Generator().manual_seed(0)),
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
@pytest.mark.parametrize("which", ["laplacian", "adjacency", "adjacency centred", "normalized", "normalized centred"])
@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_eigenspaces_are_those_of_the_dense_matrix(G: Relation, which: str, dense_rows: int, monkeypatch) -> None:
    """Values, dimensions, projectors and bases; by structure, by the dense solver and by Lanczos."""
    monkeypatch.setattr(spectrum, "DENSE", dense_rows)
    which, _, center = which.partition(" ")
    centred = bool(center) or which == "laplacian"
    k = 5
    A = matrix(G, which, bool(center))
    out = torch.ones(12, 1, dtype=torch.float64) if which != "normalized" else G.dense(torch.float64).sum(1).sqrt()[:, None]
    sign = -1 if which == "laplacian" else 1
    P = torch.eye(12, dtype=torch.float64) - out @ out.T / out.square().sum() if centred else torch.eye(12, dtype=torch.float64)
    if which == "normalized":
        P = P * (G.degrees > 0)[:, None] * (G.degrees > 0)
    expected = torch.linalg.eigvalsh(P @ (sign * A + 10 * torch.eye(12)) @ P).flip(0)[:k] - 10
    taken = theory.leading(spectrum.spectrum(G, which, k, bool(center)), k)
    assert_close(sign * theory.repeat_values(taken), expected, rtol=1e-8, atol=1e-8)
    for space, q in taken:
        full = space.basis(space.dim)
        assert_close(full.T @ full, torch.eye(space.dim, dtype=torch.float64), rtol=0, atol=1e-8)
        assert_close(A @ full, space.value * full, rtol=1e-7, atol=1e-7)
        X = torch.randn(12, 3)
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
        [Z], max_iter=3000, history_size=50, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
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
    for name in ("views V=2", "labels", "labels normalized", "edges", "edges apart", "neighbors", "neighbors normalized")
    for K in (3, 14)
]
EXACTS += [(VICReg(2.0, 5.0, 0.5, variance="squared"), name, 4) for name in ("labels", "edges")]
EXACTS += [
    (SquaredSimCLR(reduction, center), name, K)
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
ATTAINED += [(SquaredSimCLR(), 4), (SquaredSimCLR("sum", center=True), 14)]
ATTAINED += [(BarlowTwins(0.1, center, eps=1e-12), K) for center in (False, True) for K in (2, 8, 14)]
ATTAINED += [(SimCLR(0.3), 12), (SimCLR(0.3, "sum"), 14)]


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize(("loss", "K"), ATTAINED)
def test_an_exact_value_or_an_upper_bound_is_attained_by_the_embedding(loss: Loss, K: int, name: str) -> None:
    G = RELATIONS[name]
    best = optimum(loss, G, K)
    if best.kind == LOWER:
        assert best.Z is None
        return
    assert best.Z.shape == (G.num_rows, K)
    assert_close(float(loss(best.Z, G)), best.value, rtol=1e-9, atol=1e-9)
    singular_values = torch.linalg.svdvals(best.Z)
    assert_close(singular_values, best.singular_values[: len(singular_values)], rtol=1e-7, atol=1e-7)
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
    for loss in (VICReg(2.0, 1.0, 2.0), BarlowTwins(0.05)):
        best = optimum(loss, G, 5)
        assert best.kind == UPPER
        assert min(descend(loss, G, 5, seed) for seed in range(3)) <= best.value * (1 + 1e-6)


def test_the_entropy_bound_is_that_of_the_rows() -> None:
    G = RELATIONS["edges"]
    d = G.dense(torch.float64).sum(1)
    assert_close(optimum(SimCLR(0.5, "sum"), G, 4).value, float(torch.special.xlogy(d, d).sum()))
    P = Normalized(G).dense(torch.float64)
    expected = -torch.special.xlogy(P, P / P.sum(1, keepdim=True).clamp(min=1e-300)).sum()
    assert_close(optimum(SimCLR(0.5, "sum"), Normalized(G), 4).value, float(expected), rtol=1e-6, atol=0)


def test_the_rank_follows_gamma_for_vicreg_and_g_for_simclr() -> None:
    """theory.md 4: rank = #{k <= K: gamma (N-1) lambda_k < N alpha}, against the positive eigenvalues of G."""
    G, K, N = RELATIONS["edges"], 10, 12
    values = torch.linalg.eigvalsh(matrix(G, "laplacian", False))[1 : K + 1]
    for gamma in (0.01, 0.3, 1.0, 3.0):
        expected = int((gamma * (N - 1) * values < N * 2.0).sum())
        assert optimum(VICReg(2.0, 2.0, gamma, variance="squared"), G, K).rank == expected
    positive = int((torch.linalg.eigvalsh(G.dense(torch.float64)) > 1e-9).sum())
    assert optimum(SquaredSimCLR(), G, 12).rank == positive < 12
    assert optimum(SimCLR(), G, 12).rank == positive


def test_laplacian_eigenmaps_are_sklearns_spectral_embedding() -> None:
    """sklearn's embedding is D^-1/2 times the eigenvectors of the normalised Laplacian: CCA's form here."""
    G = random_pairs(60, 200)
    theirs = SpectralEmbedding(4, affinity="precomputed", random_state=0).fit_transform(G.dense(torch.float64).numpy())
    ours = optimum(BarlowTwins(center=True), G, 4).Z
    theirs = torch.from_numpy(theirs)
    theirs = theirs / theirs.square().sum(0).sqrt()
    ours = ours / ours.square().sum(0).sqrt()
    assert_close((theirs * ours).sum(0).abs(), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_structure_spares_the_eigenproblem_of_a_large_relation() -> None:
    """200,000 rows of views and labels; the optimum is theirs without any N x N matrix."""
    views, labels = Views(100_000, 2), Labels(torch.arange(200_000) % 10, normalized=True)
    for loss in (VICReg(variance="squared"), SimCLR(), SquaredSimCLR(), BarlowTwins()):
        best = optimum(loss, views, 16)
        assert best.rank == 16
        assert optimum(loss, labels, 16).rank >= 9
    Z = optimum(VICReg(), views, 16).Z
    assert_close(float(VICReg()(Z, views)), 0.0, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_a_sparse_relation_of_20000_rows_is_solved_iteratively() -> None:
    G, K = random_pairs(20_000, 100_000), 16
    best = optimum(VICReg(1.0, 1.0, 0.02, variance="squared"), G, K)
    Z = best.Z
    U = Z / Z.square().sum(0).sqrt()
    LU = G.degrees[:, None] * U - G @ U
    values = (U * LU).sum(0)
    assert (LU - U * values).norm(dim=0).max() < 1e-6
    assert_close(float(VICReg(1.0, 1.0, 0.02, variance="squared")(Z, G)), best.value, rtol=1e-8, atol=0)


def test_a_relation_of_high_multiplicity_without_the_structure_of_cliques_is_decomposed() -> None:
    """260 images twice, classes of 52 rows less one pair each: LAPACK's "evr" gives up on this one."""
    i, j = Labels(torch.arange(520) % 10).edges()
    G = Normalized(Edges(i[i < j][10:], j[i < j][10:], 520))
    best = optimum(SquaredSimCLR(), G, 64)
    true = torch.linalg.eigvalsh(G.dense(torch.float64)).flip(0)[:64].clamp(min=0)
    assert_close(best.singular_values, (true * 520**2 / float(G.degrees.sum())).sqrt(), rtol=1e-6, atol=1e-5)


def test_alignment_is_one_at_the_optimum_and_small_at_random() -> None:
    y = torch.arange(400) % 4
    for G in (Views(200, 2), Labels(y), noisy(Labels(y), 0.3, torch.Generator().manual_seed(0))):
        for loss in (VICReg(1.0, 1.0, 1e-3, variance="squared"), SquaredSimCLR(), BarlowTwins()):
            best = optimum(loss, G, 3)
            rotated = best.Z @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
            assert_close(theory.alignment(rotated, best), 1.0, rtol=1e-9, atol=0)
    labels = optimum(VICReg(), Labels(y), 3)
    random = [theory.alignment(torch.randn(400, 3), labels) for _ in range(20)]
    assert sum(random) / 20 < 0.05  # 3 / 399 on average


def test_label_energy_is_what_least_squares_explains() -> None:
    y = torch.arange(60) % 3
    Y, Z = torch.nn.functional.one_hot(y).double(), torch.randn(60, 5, dtype=torch.float64)
    Yc, Zc = Y - Y.mean(0), Z - Z.mean(0)
    residual = Yc - Zc @ torch.linalg.lstsq(Zc, Yc).solution
    expected = 1 - float(residual.square().sum() / Yc.square().sum())
    for same in (Zc, torch.cat([Zc, Zc], 1), torch.cat([Zc, torch.zeros(60, 90)], 1)):
        assert_close(theory.label_energy(same, Y), expected, rtol=1e-6, atol=0)
    assert theory.label_energy(torch.zeros(60, 4), Y) == 0


def test_the_label_energy_of_a_relation() -> None:
    y = torch.arange(60) % 3
    Y = torch.nn.functional.one_hot(y)
    for loss in (VICReg(), SimCLR(), BarlowTwins()):
        assert_close(theory.exposed(Y, optimum(loss, Labels(y), 3))[0], 1.0, rtol=1e-9, atol=0)
        assert theory.exposed(Y, optimum(loss, Labels(torch.arange(60) % 20 // 4), 3))[0] < 0.2
    most, mean = theory.exposed(Y.repeat(2, 1), optimum(VICReg(), Views(60, 2), 3))
    assert_close(most, 1.0, rtol=1e-9, atol=0)
    assert_close(mean, 3 / 59, rtol=1e-9, atol=0)


def test_a_loss_without_a_closed_form_says_so() -> None:
    class Other(Loss):
        def _terms(self, Z, G):
            return {}

    with pytest.raises(NotImplementedError, match="Other has no closed form"):
        optimum(Other(), Views(3, 2), 2)
