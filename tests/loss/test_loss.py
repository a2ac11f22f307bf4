"""Losses, compared with golden values, double sums and the authors' formulas, and their invariances."""

import json
import math
from inspect import signature
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ssl_runner.loss import (
    MMCR,
    WMSE,
    BarlowTwins,
    FroSSL,
    Loss,
    SIGReg,
    SimCLR,
    SpectralContrastive,
    VICReg,
    counter,
    kernels,
    mmcr,
    sigreg,
    simclr,
    wmse,
)
from ssl_runner.loss.base import off_diagonal
from ssl_runner.relation import DegreeNormalized, Edges, Labels, Relation, Views
from tests.helpers import is_defined

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "loss").glob("*.yaml"))
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
Y = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3, 0, 2])
RELATIONS = {
    "views V=2": Views(5, 2),
    "views V=5": Views(2, 5),
    "labels": Labels(Y),
    "labels normalized": Labels(Y, normalized=True),
    "edges": Edges(torch.tensor([0, 1, 2, 7, 8]), torch.tensor([3, 2, 9, 0, 5]), 10),
}
LOSSES = {
    "vicreg": VICReg(gamma=25.0),
    "vicreg squared": VICReg(2.0, 2.0, 0.5, variance="squared"),
    "simclr": SimCLR(0.2),
    "simclr sum": SimCLR(0.5, reduction="sum"),
    "simclr negatives": SimCLR(0.2, denominator="negatives"),
    "spectral": SpectralContrastive(),
    "spectral sum": SpectralContrastive("sum", center=True),
    "barlow": BarlowTwins(0.1),
    "barlow centred": BarlowTwins(5e-3, center=True),
    "mmcr": MMCR(),
    "frossl": FroSSL(),
    "sigreg": SIGReg(0.5, 2.0, directions=5).eval(),
    "wmse": WMSE(),
    "wmse without unit rows": WMSE(unit_rows=False),
}
OF_VIEWS = {"mmcr with manifolds": MMCR(0.7), "frossl per view": FroSSL(per_view=True)}


DEFINED = [
    pytest.param(loss, G, id=f"{name}-{of}")
    for name, loss in (LOSSES | OF_VIEWS).items()
    for of, G in RELATIONS.items()
    if is_defined(loss, G)
]


def golden_embeddings(case: dict, dtype: torch.dtype) -> torch.Tensor:
    i = torch.arange(case["N"], dtype=torch.float64)[:, None]
    k = torch.arange(case["K"], dtype=torch.float64)
    return (case["scale"] * (0.7 * i + 1.3 * k + 0.1 * i * k + 0.3).sin()).to(dtype)


def golden_relation(relation: dict) -> Relation:
    if relation["kind"] == "views":
        return Views(relation["n"], relation["V"])
    if relation["kind"] == "labels":
        return Labels(torch.tensor(relation["y"]))
    i, j = torch.tensor(relation["edges"]).T
    return Edges(i, j, relation["N"])


def golden_loss(case: dict) -> Loss:
    if case["loss"] == "vicreg":
        return VICReg(case["alpha"], case["beta"], case["gamma"], case["variance"], case["eps"])
    if case["loss"] == "simclr":
        return SimCLR(case["tau"], case["reduction"])
    return BarlowTwins(case["alpha"], case["center"], case["eps"])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda case: f"{case['loss']}-{case['relation']['kind']}-{case['value']:.6g}"
)
def test_loss_matches_golden_value(case: dict, dtype: torch.dtype, rtol: float) -> None:
    relation = golden_relation(case["relation"])
    value = golden_loss(case)(golden_embeddings(case, dtype), relation)
    assert value.dtype == dtype
    assert_close(value.double(), torch.tensor(case["value"], dtype=torch.float64), rtol=rtol, atol=0)


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_vicreg_matches_double_sum(G: Relation) -> None:
    Z = torch.randn(10, 4, dtype=torch.float64)
    distances = torch.cdist(Z, Z).square()
    assert_close(VICReg(0, 0, 1)(Z, G), (G.dense(torch.float64) * distances).sum() / 10)
    C = Z.T.cov()
    off_diagonal = sum(C[j, k] ** 2 for j in range(4) for k in range(4) if j != k)
    assert_close(VICReg(0, 1, 0)(Z, G), off_diagonal)
    assert_close(VICReg(1, 0, 0, eps=0)(Z, G), (1 - Z.std(0)).clamp(min=0).sum())
    assert_close(VICReg(1, 0, 0, variance="squared")(Z, G), (1 - Z.var(0)).square().sum())


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_simclr_matches_cross_entropy_of_g_and_softmax(G: Relation) -> None:
    Z = torch.randn(10, 4, dtype=torch.float64)
    S = F.cosine_similarity(Z[:, None], Z, dim=2) / 0.3
    log_softmax = S.masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf).log_softmax(1).fill_diagonal_(0)
    dense = G.dense(torch.float64)
    assert_close(SimCLR(0.3, "sum")(Z, G), -(dense * log_softmax).sum())
    assert_close(SimCLR(0.3)(Z, G), -(dense * log_softmax).sum() / dense.sum())


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_spectral_matches_squared_distance_of_gram_matrix_and_g(G: Relation) -> None:
    Z, dense = torch.randn(10, 4, dtype=torch.float64), G.dense(torch.float64)
    assert_close(SpectralContrastive("sum")(Z, G), (Z @ Z.T - dense).square().sum())
    Zc = Z - Z.mean(0)
    assert_close(SpectralContrastive("sum", center=True)(Z, G), (Zc @ Zc.T - dense).square().sum())
    gram = Z @ Z.T
    spectral = gram.square().mean() - 2 * (dense * gram).sum() / dense.sum()  # HaoChen et al. 2021, eq. 6
    assert_close(SpectralContrastive()(Z, G), spectral)


@pytest.mark.parametrize("name", ["views V=2", "views V=5", "labels", "edges"])
def test_barlow_matches_cross_correlation_of_all_positive_pairs(name: str) -> None:
    Z, G = torch.randn(10, 4, dtype=torch.float64), RELATIONS[name]
    i, j = G.edges()
    for center in (False, True):
        left, right = (Z[rows] - (Z[rows].mean(0) if center else 0) for rows in (i, j))
        C = F.normalize(left, dim=0).T @ F.normalize(right, dim=0)
        value = (C.diagonal() - 1).square().sum() + 0.1 * (C.square().sum() - C.diagonal().square().sum())
        assert_close(BarlowTwins(0.1, center, eps=0)(Z, G), value)


def test_vicreg_matches_authors_formula() -> None:
    """Bardes et al.: 25 mse + 25 mean hinge + covariance / K, with one covariance per view.

    K times this equals VICReg(25, 2, 25) for views with equal statistics, except that the covariance over all
    rows is divided by 2n - 1 and not by n - 1.
    """
    n, K = 20_000, 6
    a = torch.randn(n, K, dtype=torch.float64) @ torch.randn(K, K, dtype=torch.float64) / 4
    b = a.flip(0)
    std = [(z.var(0) + 1e-4).sqrt() for z in (a, b)]
    hinge = sum(F.relu(1 - s).mean() / 2 for s in std)
    covariance = sum((z.T.cov() - z.T.cov().diagonal().diag()).square().sum() / K for z in (a, b))
    official = 25 * F.mse_loss(a, b) + 25 * hinge + covariance
    assert_close(VICReg(25, 2, 25)(torch.cat([a, b]), Views(n, 2)), K * official, rtol=1e-4, atol=0)


def test_simclr_matches_authors_nt_xent() -> None:
    """Chen et al.: NT-Xent, the mean cross-entropy of each row's positive among the 2n - 1 other rows."""
    n, tau = 7, 0.5
    Z = F.normalize(torch.randn(2 * n, 5, dtype=torch.float64))
    logits = (Z @ Z.T / tau).fill_diagonal_(-torch.inf)
    assert_close(SimCLR(tau)(Z, Views(n, 2)), F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n)))


def test_barlow_matches_authors_formula() -> None:
    """Zbontar et al.: batch norm, then the cross-correlation divided by n.

    b is a with its rows in reverse order. The views then have equal statistics and a symmetric
    cross-correlation. Ours is always symmetric, because it counts every pair in both orders.
    """
    n, K, lambd = 30, 5, 5e-3
    a = torch.randn(n, K, dtype=torch.float64) + 3
    b = a.flip(0)
    normalized = [F.batch_norm(z, None, None, training=True, eps=1e-14) for z in (a, b)]
    c = normalized[0].T @ normalized[1] / n
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = (c - c.diagonal().diag()).square().sum()
    assert_close(
        BarlowTwins(lambd, center=True, eps=0)(torch.cat([a, b]), Views(n, 2)),
        on_diagonal + lambd * off_diagonal,
    )


def test_mmcr_matches_authors_formula() -> None:
    """Yerxa et al.: alpha mean_b |Z_b|_* - |C|_* over b images with rows image-major, n_aug views each."""
    for n, V in ((5, 2), (2, 5)):
        Z = torch.randn(V * n, 4, dtype=torch.float64)
        image_major = np.stack(
            [[(z := Z[v * n + b].numpy()) / np.linalg.norm(z) for v in range(V)] for b in range(n)]
        )
        local = sum(np.linalg.norm(rows, "nuc") for rows in image_major) / n
        official = 0.7 * local - np.linalg.norm(image_major.mean(1), "nuc")
        assert_close(float(MMCR(0.7)(Z, Views(n, V))), official)


def test_mmcr_of_labels_matches_loop_over_classes() -> None:
    """A class without rows does not count."""
    Z = torch.randn(10, 3, dtype=torch.float64)
    unit = [z / np.linalg.norm(z) for z in Z.numpy()]
    C = np.stack([np.mean([unit[i] for i in range(10) if Y[i] == c], axis=0) for c in range(4)])
    for G in (Labels(Y), Labels(Y, num_classes=9), Labels(Y, normalized=True), DegreeNormalized(Labels(Y))):
        assert_close(float(MMCR()(Z, G)), -np.linalg.norm(C, "nuc"))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nuclear_norm_has_smallest_subgradient_at_deficient_rank(
    shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    """f(X) >= f(C) + <g, X - C> for all X. UV' of rank r is the only subgradient of squared norm r."""
    C = torch.randn(shape[0], rank, dtype=dtype) @ torch.randn(rank, shape[1], dtype=dtype)
    C.requires_grad_()
    value = mmcr._NuclearNorm.apply(C)
    (g,) = torch.autograd.grad(value, C)
    assert_close(g.square().sum(), torch.tensor(rank, dtype=dtype), rtol=1e-4, atol=1e-4)
    for scale in (1e-3, 1.0, 10.0):
        step = scale * torch.randn(shape, dtype=dtype)
        further = np.linalg.norm((C.detach() + step).double().numpy(), "nuc")
        assert further >= float(value.detach() + (g * step).sum()) - 1e-5 * (1 + scale)


def test_mmcr_of_non_finite_embeddings_is_nan() -> None:
    """torch.linalg.svd raises for them, and the training's guard would not report the diverged term."""
    Z = torch.randn(10, 3)
    Z[4, 1] = torch.nan
    assert MMCR()(Z, Views(5, 2)).isnan()
    assert MMCR(1.0)(Z, Views(5, 2)).isnan()


@pytest.mark.parametrize("V", [2, 5])
def test_frossl_matches_authors_multiview_formula(V: int) -> None:
    """Skean et al.: sum over views of 2 log |K_v|_F + mse(view, mean view), rows of length sqrt(K).

    K_v is the Gram matrix of the view, K x K or n x n, divided by its trace.
    """
    n, K, weight = 10 // V, 4, 0.8
    Z = torch.randn(10, K, dtype=torch.float64)
    views = [K**0.5 * z / z.norm(dim=1, keepdim=True) for z in Z.chunk(V)]
    mean = torch.stack(views).mean(0)
    official = torch.zeros((), dtype=torch.float64)
    for view in views:
        gram = view.T @ view if n > K else view @ view.T
        official += 2 * (gram / gram.trace()).norm().log() + weight * F.mse_loss(view, mean)
    loss = FroSSL(weight / (2 * V), per_view=True)
    assert_close(V * loss(Z, Views(n, V)), official)


@pytest.mark.parametrize("V", [2, 3])
def test_sigreg_per_view_matches_authors_formula(V: int) -> None:
    """Balestriero & LeCun: lambda * statistic + (1 - lambda) * squared distance from the mean of the views.

    Their minimal example has 17 knots in [0, 3], and takes means over views, images, columns and directions.
    """
    n, K, lamb = 8, 4, 0.02
    loss = SIGReg(lamb, (1 - lamb) / (2 * V * K), directions=6, per_view=True).eval()
    Z = torch.randn(V, n, K, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    gaussian = torch.exp(-(t**2) / 2)
    weights = torch.tensor([1.0] + 15 * [2.0] + [1.0]).double() * 3 / 16 * gaussian
    angles = torch.einsum("vnk,km,t->vnmt", Z, directions(loss, Z[0]), t)
    errors = (angles.cos().mean(1) - gaussian) ** 2 + angles.sin().mean(1) ** 2
    prediction = (Z.mean(0) - Z).square().mean()
    official = lamb * n * (errors @ weights).mean() + (1 - lamb) * prediction
    value = loss(Z.flatten(0, 1), Views(n, V))
    assert_close(value, official)
    gradients = [torch.autograd.grad(total, Z)[0] for total in (value, official)]
    assert_close(*gradients)


@pytest.mark.parametrize("size", [12, 6, 4])
@pytest.mark.parametrize("unit_rows", [True, False])
def test_wmse_matches_authors_formula(size: int, unit_rows: bool) -> None:
    """Ermolov et al.: each view of `size` random images is whitened; mean distance of the pairs of views.

    With unit rows it is 2 - 2 cos, otherwise the mean over columns as well.
    """
    n, K, V = 12, 3, 3
    Z = torch.randn(V * n, K, dtype=torch.float64)
    loss = WMSE(unit_rows, whitening_size=size).eval()
    W = torch.zeros_like(Z).view(V, n, K)
    for images in loss.counter.bits(n).argsort().view(-1, size):
        for v in range(V):
            z = Z.view(V, n, K)[v, images]
            inverse = torch.linalg.inv(torch.linalg.cholesky(z.T.cov()))
            W[v, images] = (z - z.mean(0)) @ inverse.T
    pairs = [(W[u], W[v]) for u in range(V) for v in range(u)]
    if unit_rows:
        official = sum(2 - 2 * F.cosine_similarity(a, b).mean() for a, b in pairs) / len(pairs)
    else:
        official = K * sum(F.mse_loss(a, b) for a, b in pairs) / len(pairs)
    assert_close(loss(Z, Views(n, V)), official)


def test_wmse_is_invariant_to_invertible_linear_maps() -> None:
    Z, G = torch.randn(10, 3, dtype=torch.float64), RELATIONS["edges"]
    A = torch.randn(3, 3, dtype=torch.float64)
    plain = WMSE(unit_rows=False)
    assert_close(plain(Z @ A + 5, G), plain(Z, G))
    W = wmse.whitened(Z)
    assert_close(W.T.cov(), torch.eye(3, dtype=torch.float64))


def test_wmse_blocks_have_at_least_whitening_size_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(wmse, "whitened", lambda Z: (rows.append(len(Z)), Z)[1])
    Z = torch.randn(22, 3)
    WMSE(whitening_size=4)(Z, Views(11, 2))
    assert rows == [6, 5, 6, 5]  # blocks of each view
    assert_close(WMSE(False, 4)(Z, Views(11, 2)), (Z[:11] - Z[11:]).square().sum() / 11)  # rows are in order


def test_statistic_of_gaussian_and_collapsed_rows() -> None:
    """N normal quantiles give almost 0, N equal rows N times that of one row."""
    quantiles = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]
    one = sigreg.epps_pulley(torch.zeros(1, 1, dtype=torch.float64))
    assert 0 < sigreg.epps_pulley(quantiles) < 1e-3 * one
    assert_close(sigreg.epps_pulley(torch.zeros(7, 2, dtype=torch.float64)), 7 * one.expand(2))
    normal = torch.randn(200, 2000, dtype=torch.float64)
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    null = torch.trapezoid((1 - (-t.square()).exp()) * (-t.square() / 2).exp(), t)  # E N |ecf - phi|^2
    assert_close(sigreg.epps_pulley(normal).mean(), null, rtol=0.05, atol=0)


def test_wmse_without_blocks_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert not WMSE().state_dict()
    assert torch.equal(torch.get_rng_state(), before)


def test_counter_matches_splitmix64() -> None:
    """Published outputs for the seed 1234567 (Vigna's splitmix64.c), as unsigned integers."""
    states = torch.tensor(1234567) + counter.INCREMENT * torch.arange(1, 4)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [x % 2**64 for x in counter.mix(states).tolist()] == published


def test_counter_draws_independent_normal_numbers() -> None:
    numbers = counter.Counter()
    numbers.state.fill_(5)
    first = numbers.normal(300, 400)
    numbers.advance()
    second = numbers.normal(300, 400)
    for x in (first, second):
        assert scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01
    for a, b in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(float((a * b).mean())) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("make", [SIGReg, lambda: WMSE(whitening_size=5)], ids=["sigreg", "wmse"])
def test_random_numbers_change_with_training_steps_only(make) -> None:
    Z, G, loss = torch.randn(20, 3, requires_grad=True), Views(10, 2), make()
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    first = loss(Z, G)
    with torch.no_grad():
        second = loss(Z, G)
        assert loss(Z, G) == second != first
    loss.load_state_dict(state)
    assert loss(Z, G) == first
    assert loss(Z, G) == second


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_frossl_matches_double_sums(G: Relation) -> None:
    Z, dense = torch.randn(10, 4, dtype=torch.float64), G.dense(torch.float64)
    cosines = F.cosine_similarity(Z[:, None], Z, dim=2)
    assert_close(FroSSL(0)(Z, G), (cosines / 10).square().sum().log())
    assert_close(FroSSL(3)(Z, G) - FroSSL(0)(Z, G), 3 / 10 * (dense * (2 - 2 * cosines)).sum())


def test_decoupled_simclr_matches_authors_formula() -> None:
    """Yeh et al.: -s of the positive + log sum over both views of the n - 1 other images, for each row."""
    n, tau = 6, 0.3
    Z = F.normalize(torch.randn(2 * n, 5, dtype=torch.float64))
    terms = []
    for i in range(2 * n):
        positive = Z[i] @ Z[(i + n) % (2 * n)] / tau
        others = torch.stack([Z[i] @ Z[k] / tau for k in range(2 * n) if k % n != i % n])
        terms.append(-positive + others.exp().sum().log())
    assert_close(SimCLR(tau, denominator="negatives")(Z, Views(n, 2)), torch.stack(terms).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoupled_simclr_keeps_small_negatives_at_small_temperature(dtype: torch.dtype) -> None:
    """A group's own sum, exp(20) a row, is 10^17 times the negatives': subtracting it would leave nothing."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.2], [-1.0, -0.1], [0.0, 1.0]])
    y, tau = torch.tensor([0, 0, 1, 1, 1, 2]), 0.05
    loss, exact = SimCLR(tau, denominator="negatives"), rows.double().requires_grad_()
    Z = rows.to(dtype).requires_grad_()
    value, expected = loss(Z, Labels(y)), sum(plain_simclr(loss, exact, Labels(y)).values())
    assert_close(value.double(), expected, rtol=1e-6, atol=0)
    (gradient,), (true,) = torch.autograd.grad(value, Z), torch.autograd.grad(expected, exact)
    assert_close(gradient.double(), true, rtol=1e-4, atol=1e-5 * float(true.norm()))


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_simclr_with_normalized_labels_is_supcon_out(tau: float) -> None:
    """Khosla et al. 2020, eq. 2: mean over anchors i of -1/|P(i)| sum_{p in P(i)} log softmax_{a != i}."""
    Z = F.normalize(torch.randn(10, 4, dtype=torch.float64))
    anchors = []
    for i in range(10):
        P = [p for p in range(10) if p != i and Y[p] == Y[i]]
        denominator = sum((Z[i] @ Z[a] / tau).exp() for a in range(10) if a != i)
        if P:
            anchors.append(-sum(((Z[i] @ Z[p] / tau).exp() / denominator).log() for p in P) / len(P))
    assert_close(SimCLR(tau)(Z, Labels(Y, normalized=True)), torch.stack(anchors).mean())


@pytest.mark.parametrize(("loss", "G"), DEFINED)
def test_loss_passes_gradcheck(loss: Loss, G: Relation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simclr, "BLOCK_ELEMENTS", 30)  # 5 x 5 tiles, or blocks of 3 rows with a last one of 1
    monkeypatch.setitem(kernels.STRIPE, "cpu", 2)  # stripes of 2 rows of C with a last one of 1
    Z = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda Z: loss(Z, G), (Z,))


def plain_vicreg(loss: VICReg, Z: torch.Tensor, G: Relation) -> dict[str, torch.Tensor]:
    """The terms in plain autograd, with the full matrices that the loss avoids."""
    C, d = Z.T.cov(), G.degrees.to(Z)[:, None]
    variances = C.diagonal()
    hinge = (1 - (variances + loss.eps).sqrt()).relu()
    return {
        "variance": (hinge if loss.variance == "hinge" else (1 - variances).square()).sum(),
        "covariance": off_diagonal(C).square().sum(),
        "invariance": 2 / len(Z) * ((d * Z - G @ Z) * Z).sum(),
    }


def plain_barlow(loss: BarlowTwins, Z: torch.Tensor, G: Relation) -> dict[str, torch.Tensor]:
    d = G.degrees.to(Z)[:, None]
    if loss.center:
        Z = Z - (d * Z).sum(0) / d.sum()
    n = (d * Z.square()).sum(0).sqrt()
    return loss.of_correlations(Z.T @ (G @ Z) / (n[:, None] * n + loss.eps))


def plain_simclr(loss: SimCLR, Z: torch.Tensor, G: Relation) -> dict[str, torch.Tensor]:
    S = F.normalize(Z) @ F.normalize(Z).T / loss.tau
    dense, eye = G.dense(Z.dtype), torch.eye(len(Z), dtype=torch.bool)
    left_out = eye | (dense > 0) if loss.denominator == "negatives" else eye
    positives = dense.sum() if loss.reduction == "mean" else 1
    return {
        "repulsion": dense.sum(1) @ S.masked_fill(left_out, -torch.inf).logsumexp(1) / positives,
        "attraction": -(dense * S).sum() / positives,
    }


def directions(loss: SIGReg, Z: torch.Tensor) -> torch.Tensor:
    return F.normalize(loss.counter.normal(Z.shape[1], loss.directions).double(), dim=0)


def plain_sigreg(loss: SIGReg, Z: torch.Tensor, G: Relation) -> dict[str, torch.Tensor]:
    """The statistic by complex exponentials at knots on both sides of 0."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    phi = (-t.square() / 2).exp()
    ecf = torch.exp(1j * (Z @ directions(loss, Z))[..., None] * t).mean(0)
    return {
        "gaussianity": len(Z) * torch.trapezoid((ecf - phi).abs().square() * phi, t, dim=-1).mean(),
        "invariance": (G.dense(Z.dtype) * (Z[:, None] - Z).square().sum(2)).sum() / len(Z),
    }


def plain_wmse(loss: WMSE, Z: torch.Tensor, G: Relation) -> dict[str, torch.Tensor]:
    W = (Z - Z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(Z.T.cov())).T
    W = F.normalize(W) if loss.unit_rows else W
    dense = G.dense(Z.dtype)
    return {"distance": (dense * (W[:, None] - W).square().sum(2)).sum() / dense.sum()}


PLAIN = {
    SIGReg(directions=5).eval(): plain_sigreg,
    WMSE(): plain_wmse,
    WMSE(unit_rows=False): plain_wmse,
    VICReg(1.0, 2.0, 3.0, eps=1e-2): plain_vicreg,
    VICReg(variance="squared"): plain_vicreg,
    BarlowTwins(0.1, eps=1e-2): plain_barlow,
    BarlowTwins(0.1, center=True): plain_barlow,
    SimCLR(): plain_simclr,
    SimCLR(0.1, "sum"): plain_simclr,
    SimCLR(0.1, denominator="negatives"): plain_simclr,
    SimCLR(0.01, "sum", "negatives"): plain_simclr,
}


@pytest.mark.parametrize(
    ("loss", "G"),
    [
        pytest.param(loss, G, id=f"{type(loss).__name__}-{of}")
        for loss, (of, G) in product(PLAIN, RELATIONS.items())
        if is_defined(loss, G)
    ],
)
@pytest.mark.parametrize("blockwise", [False, True], ids=["one block", "many blocks"])
def test_terms_and_gradients_match_plain_autograd(
    loss: Loss, G: Relation, blockwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blockwise:
        monkeypatch.setitem(kernels.STRIPE, "cpu", 3)
        monkeypatch.setattr(simclr, "BLOCK_ELEMENTS", 9)
        monkeypatch.setattr(simclr, "KEPT_ELEMENTS", 18)  # two tiles
    Z = (torch.randn(10, 7, dtype=torch.float64) + 1).requires_grad_()
    plain = PLAIN[loss](loss, Z, G)
    for name, term in loss.terms(Z, G).items():
        assert_close(term, plain[name])
        (gradient,) = torch.autograd.grad(term, Z, retain_graph=True)
        (expected,) = torch.autograd.grad(plain[name], Z, retain_graph=True)
        assert_close(gradient, expected)


@pytest.mark.parametrize("tau", [1e-3, 0.01, 0.027, 0.03, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simclr_is_exact_for_small_temperatures(tau: float, dtype: torch.dtype) -> None:
    """With nearly equal and opposite rows, exp(s) overflows and underflows for small tau."""
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    Z, G = rows.to(dtype).requires_grad_(), Edges(torch.tensor([0, 2]), torch.tensor([1, 3]), 4)
    exact = rows.double().requires_grad_()
    value, expected = SimCLR(tau)(Z, G), sum(plain_simclr(SimCLR(tau), exact, G).values())
    (gradient,), (expected_gradient,) = torch.autograd.grad(value, Z), torch.autograd.grad(expected, exact)
    assert_close(value.double(), expected, rtol=1e-5, atol=0)
    atol = 1e-4 * math.sqrt(expected_gradient.square().sum())
    assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_second_derivative_raises_or_is_correct(loss: Loss) -> None:
    Z = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    if isinstance(loss, SpectralContrastive):  # no custom backward
        assert torch.autograd.gradgradcheck(lambda Z: loss(Z, Views(5, 2)), (Z,))
        return
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(Z, Views(5, 2)), Z, create_graph=True)


@pytest.mark.parametrize("G", [Views(5, 2), Views(2, 5), None], ids=["pairs", "views", "gram"])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_stripes_cover_whole_product(G: Relation | None, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.STRIPE, "cpu", step)
    Z = torch.randn(10, 7, dtype=torch.float64)
    GZ = Z if G is None else G @ Z
    product = kernels.SymmetricProduct(Z, GZ, G)
    assert_close(
        sum(kernels.stripe_square_sum(stripe) for *_, stripe in product.stripes()), (Z.T @ GZ).square().sum()
    )
    assert_close(product.matrix, Z.T @ GZ)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_is_weighted_sum_of_terms(loss: Loss) -> None:
    Z, G = torch.randn(10, 3), RELATIONS["labels"]
    terms = loss.terms(Z, G)
    assert terms.keys() == loss.weights.keys()
    assert_close(loss(Z, G), sum(loss.weights[name] * term for name, term in terms.items()))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_is_invariant_to_row_order(loss: Loss) -> None:
    Z, order = torch.randn(10, 3, dtype=torch.float64), torch.randperm(10)
    assert_close(loss(Z[order], Labels(Y[order])), loss(Z, Labels(Y)))


def test_losses_are_invariant_to_shift_scale_and_rotation() -> None:
    """VICReg: shift. SimCLR: row scale, rotation. Barlow: column scale, and shift if centred."""
    Z, G = torch.randn(10, 3, dtype=torch.float64), RELATIONS["labels"]
    shift = torch.randn(3).double()
    columns, rows = torch.rand(3).double() + 0.5, torch.rand(10, 1).double() + 0.5
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    assert_close(VICReg()(Z + shift, G), VICReg()(Z, G))
    assert_close(SimCLR()(rows * Z @ rotation, G), SimCLR()(Z, G))
    assert_close(BarlowTwins(eps=0)(columns * Z, G), BarlowTwins(eps=0)(Z, G))
    centred = BarlowTwins(center=True, eps=0)
    assert_close(centred(columns * Z + shift, G), centred(Z, G))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_loss_is_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    Z = (200 * torch.randn(10, 3)).to(dtype).requires_grad_()  # 200^2 x 10 overflows in fp16
    G = RELATIONS["labels"]
    exact = Z.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype):
        value = loss(Z, G)
    value.backward()
    loss(exact, G).backward()
    assert value.dtype == torch.float32
    assert_close(value, loss(exact, G))
    assert_close(Z.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_collapsed_embeddings_have_finite_gradients(loss: Loss) -> None:
    if isinstance(loss, WMSE):  # cannot be whitened
        assert loss(torch.ones(10, 3), RELATIONS["labels"]).isnan()
        return
    for Z in (torch.zeros(10, 3), torch.ones(10, 3)):
        Z.requires_grad_()
        value = loss(Z, RELATIONS["labels"])
        value.backward()
        assert value.isfinite()
        assert Z.grad.isfinite().all()


@pytest.mark.parametrize("denominator", ["all", "negatives"])
def test_simclr_allocates_no_n_by_n_tensor(denominator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
            self.elements = max([self.elements, *(t.numel() for t in tensors)])
            return out

    monkeypatch.setattr(simclr, "BLOCK_ELEMENTS", 2**14)
    Z = torch.randn(2048, 4, requires_grad=True)
    with Largest() as largest:
        SimCLR(denominator=denominator)(Z, Views(1024, 2)).backward()
    assert 2**13 < largest.elements <= 2**14


@pytest.mark.parametrize(("N", "tiles"), [(1024, 1), (4096, 1), (8192, 3)])
def test_simclr_computes_large_tiles_once_elsewhere_than_on_cpu(N: int, tiles: int) -> None:
    """The counter leaves out products in place, which are those of the gradient.

    8,192 rows have two tiles on the diagonal and one above it, of 4,096 rows and columns each.
    """
    Z, G = torch.empty(N, 16, device="meta", requires_grad=True), Views(N // 2, 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        SimCLR()._terms(Z, G)["repulsion"].backward()
    assert counter.get_total_flops() == tiles * 2 * min(N, 4096) ** 2 * 16


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_python_defaults_equal_configured_defaults(path: Path) -> None:
    options = OmegaConf.to_container(OmegaConf.load(path).loss, resolve=True)
    parameters = signature(get_class(options.pop("_target_"))).parameters.values()
    assert options == {p.name: p.default for p in parameters if p.name != "eps"}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_rejects_wrong_number_of_rows(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"Z.shape=\(9, 3\): expected \(10, K\)"):
        loss(torch.randn(9, 3), RELATIONS["labels"])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("N", [0, 1])
def test_loss_of_one_row_is_defined_or_rejected(loss: Loss, N: int) -> None:
    empty = torch.empty(0, dtype=torch.long)
    Z, G = torch.randn(N, 3, requires_grad=True), Edges(empty, empty, N)
    if loss.needs_groups and N:
        G = Labels(torch.zeros(N, dtype=torch.long))
    if loss.min_rows > N:
        with pytest.raises(ValueError, match=f"^{N} rows?: expected at least {loss.min_rows} for"):
            loss(Z, G)
    else:
        value = loss(Z, G)
        value.backward()
        assert value.isfinite()
        assert Z.grad.isfinite().all()


@pytest.mark.parametrize("name", ["barlow centred", "spectral sum"])
@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_centred_loss_is_exact_for_large_means(name: str, G: Relation) -> None:
    """Means of 1e6 deviations. float64 on the same float32 input is the reference."""
    Z = torch.randn(10, 3) + torch.tensor([1e6, -3e6, 2e6])
    exact = Z.double().requires_grad_()
    value, expected = LOSSES[name](Z.requires_grad_(), G), LOSSES[name](exact, G)
    value.backward()
    expected.backward()
    assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert_close(Z.grad.double(), exact.grad, rtol=1e-3, atol=1e-3 * float(exact.grad.abs().max()))


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-13, 1e17, 1e20, 1e37])
@pytest.mark.parametrize("loss", [SimCLR(), MMCR(), FroSSL()], ids=["simclr", "mmcr", "frossl"])
def test_loss_of_unit_rows_is_invariant_to_extreme_scales(loss: Loss, magnitude: float) -> None:
    """Only the directions of rows count, and the gradient of a row is inverse to its norm."""
    Z = torch.randn(10, 3).requires_grad_()
    scales = torch.tensor([1.0, magnitude]).repeat(5)[:, None]
    scaled = (Z.detach() * scales).requires_grad_()
    value, expected = (loss(rows, RELATIONS["labels"]) for rows in (scaled, Z))
    value.backward()
    expected.backward()
    assert_close(value, expected)
    assert_close(scaled.grad * scales, Z.grad, rtol=1e-4, atol=1e-6)


def test_usual_rows_are_normalised_as_by_torch() -> None:
    Z = torch.randn(6, 4) * torch.tensor([1e-11, 1e-5, 1.0, 1e5, 1e15, 0.0])[:, None]
    a, b = Z.clone().requires_grad_(), Z.clone().requires_grad_()
    assert torch.equal(kernels.unit_rows(a), F.normalize(b))
    kernels.unit_rows(a)[:, 0].sum().backward()
    F.normalize(b)[:, 0].sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimCLR(0),
        lambda: SimCLR(reduction="none"),
        lambda: SimCLR(denominator="positives"),
        lambda: VICReg(variance="soft"),
        lambda: SIGReg(directions=0),
        lambda: SIGReg(per_view=True)(torch.randn(10, 3), Labels(Y)),
        lambda: WMSE(whitening_size=1),
        lambda: WMSE()(torch.randn(10, 10), Labels(Y)),
    ],
    ids=["tau", "reduction", "denominator", "variance", "directions", "per_view", "whitening_size", "K"],
)
def test_loss_rejects_invalid_hyperparameters(make) -> None:
    with pytest.raises(ValueError, match=": expected "):
        make()


class ViewsOfMine(Views):
    """A subclass may override the product, so its groups are not known."""


@pytest.mark.parametrize(
    ("loss", "G", "message"),
    [
        (MMCR(), RELATIONS["edges"], "G=Edges: expected a relation whose positives form groups, for MMCR"),
        (MMCR(), ViewsOfMine(5, 2), "G=ViewsOfMine: expected a relation whose positives form groups"),
        (SimCLR(denominator="negatives"), RELATIONS["edges"], "G=Edges: .* groups, for SimCLR"),
        (
            SimCLR(denominator="negatives"),
            Views(1, 10),
            "denominator=negatives: expected rows of two or more",
        ),
        (SimCLR(denominator="negatives"), Labels(Y * 0, 4), "denominator=negatives: expected rows of two"),
        (MMCR(1.0), RELATIONS["labels"], "G=Labels: expected a relation of views, for MMCR"),
        (FroSSL(per_view=True), RELATIONS["labels"], "G=Labels: expected a relation of views, for FroSSL"),
    ],
)
def test_loss_rejects_relation_it_is_not_defined_for(loss: Loss, G: Relation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(10, 3), G)


def test_wmse_loads_checkpoints_of_earlier_versions() -> None:
    """They have the state of a counter also without blocks."""
    WMSE().load_state_dict({"counter.state": torch.tensor(0)})
