"""Closed forms of linear models compared with dense linear algebra, scikit-learn, SciPy and descent."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.testing import assert_close

from ssl_runner.errors import UsageError
from ssl_runner.loss import WMSE, BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import DegreeNormalized, Edges, Labels, Relation, Views
from ssl_runner.relation.builders import FromViews
from ssl_runner.theory import EXACT, UPPER, LinearOptimum, linear_optimum, value_of
from ssl_runner.theory.linear import build_linear_optimum, check_linear_optimum
from ssl_runner.theory.moments import CentredMoments, Moments
from ssl_runner.theory.solver import ClosedForm

CPU = torch.device("cpu")
N, D = 60, 7
Y = torch.arange(N) % 4
UNEVEN = torch.tensor([0] * 30 + [1] * 15 + [2] * 14 + [3])
RELATIONS = {
    "views": Views(20, 3),
    "views normalized": Views(30, 2, normalized=True),
    "labels": Labels(UNEVEN),
    "labels normalized": Labels(UNEVEN, normalized=True),
    "edges": Edges(torch.arange(0, 40), torch.arange(10, 50), N),
    "edges normalized": DegreeNormalized(Edges(torch.arange(0, 40), torch.arange(10, 50), N)),
}


def data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated columns with nonzero means, class structure, and similar views."""
    mixing = torch.randn(D, D, dtype=dtype)
    return (
        torch.randn(N, D, dtype=dtype) + torch.randn(20, D, dtype=dtype).repeat(3, 1) + 0.5 * Y[:, None]
    ) @ mixing + 3


def moments_of(X: Tensor, G: Relation) -> CentredMoments:
    moments = Moments(X.shape[1], CPU)
    moments.add(X, G)
    return moments.centred()


def cosines(U: Tensor, V: Tensor) -> Tensor:
    """Cosines of the principal angles between two column spaces."""
    return torch.linalg.svdvals(torch.linalg.qr(U)[0].T @ torch.linalg.qr(V)[0])


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_moments_match_dense_products(G: Relation) -> None:
    X = data()
    m, dense, Xc = moments_of(X, G), G.dense(torch.float64), X - X.mean(0)
    assert_close(m.mean, X.mean(0))
    assert_close(m.XHX, Xc.T @ Xc)
    assert_close(m.XGX, Xc.T @ dense @ Xc)
    assert_close(m.XDX, Xc.T @ dense.sum(1).diag() @ Xc)
    assert_close(m.total, float(dense.sum()), rtol=1e-6, atol=0)
    assert_close(m.square_norm, float(dense.square().sum()), rtol=1e-6, atol=0)


def test_moments_of_batches_match_block_diagonal_relation() -> None:
    X = data()
    moments, blocks = Moments(D, CPU), []
    for start, G in ((0, Views(10, 2)), (20, Views(5, 4)), (40, Edges([0, 3], [5, 9], 20))):
        moments.add(X[start : start + 20], G)
        blocks.append(G.dense(torch.float64))
    m, dense, Xc = moments.centred(), torch.block_diag(*blocks), X - X.mean(0)
    assert_close(m.XGX, Xc.T @ dense @ Xc)
    assert_close(m.XDX, Xc.T @ dense.sum(1).diag() @ Xc)


@pytest.mark.parametrize("normalized", [False, True])
def test_moments_by_class_span_all_batches(normalized: bool) -> None:
    X, order = data(), torch.randperm(N)
    moments = Moments(D, CPU, torch.bincount(UNEVEN), normalized)
    for rows in order.split(13):
        moments.add_classes(X[rows], UNEVEN[rows])
    m, expected = moments.centred(), moments_of(X, Labels(UNEVEN, normalized=normalized))
    for name in ("mean", "XHX", "XGX", "XDX"):
        assert_close(getattr(m, name), getattr(expected, name))
    assert_close(m.total, expected.total, rtol=1e-6, atol=0)
    assert_close(m.square_norm, expected.square_norm, rtol=1e-6, atol=0)


def test_moments_of_float32_features_with_large_mean_are_precise() -> None:
    X = data()
    shifted = X + 1000
    moments = Moments(D, CPU)
    for rows in shifted.float().split(20):
        moments.add(rows, Views(10, 2))
    exact = Moments(D, CPU)
    for rows in (shifted.float().double() - 1000).split(20):
        exact.add(rows, Views(10, 2))
    assert_close(moments.centred().XHX, exact.centred().XHX, rtol=1e-5, atol=1e-3)


LOSSES = [
    VICReg(2.0, 1.0, 3.0),
    VICReg(2.0, 5.0, 0.3, variance="squared"),
    SpectralContrastive("sum"),
    SpectralContrastive("mean"),
    BarlowTwins(0.1),
    WMSE(unit_rows=False),
]


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_value_from_moments_equals_loss(loss: Loss, G: Relation) -> None:
    X, W = data(), torch.randn(D, 3, dtype=torch.float64)
    m = moments_of(X, G)
    assert_close(value_of(loss, m.transform(W)), float(loss((X - X.mean(0)) @ W, G)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_vicreg_optimum_is_locality_preserving_projections(G: Relation) -> None:
    """Compared with SciPy's generalised eigensolver on dense matrices."""
    X, dense = data(), G.dense(torch.float64)
    Xc = X - X.mean(0)
    L = dense.sum(1).diag() - dense
    mu, w = scipy.linalg.eigh((Xc.T @ L @ Xc).numpy(), (Xc.T @ Xc).numpy())
    best = linear_optimum(VICReg(2.0, 2.0, 1e-3, variance="squared"), moments_of(X, G), 3)
    assert_close(best.eigenvalues, torch.from_numpy(mu[:3].copy()), rtol=1e-6, atol=1e-8)
    assert_close(
        cosines(best.W, torch.from_numpy(w[:, :3].copy())),
        torch.ones(3, dtype=torch.float64),
        rtol=0,
        atol=1e-8,
    )


def test_optimum_on_labels_is_linear_discriminant_analysis() -> None:
    X = data()
    theirs = LinearDiscriminantAnalysis(solver="eigen", n_components=3).fit(X.numpy(), Y.numpy())
    for loss in (BarlowTwins(), VICReg(1.0, 1.0, 1e-6, variance="squared"), SimCLR()):
        for normalized in (False, True):
            best = linear_optimum(loss, moments_of(X, Labels(Y, normalized=normalized)), 3)
            span = torch.from_numpy(theirs.scalings_[:, :3].copy())
            assert_close(cosines(best.W, span), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-8)


def test_only_normalized_labels_keep_the_discriminants_of_small_classes() -> None:
    """400, 100, 30 and 10 rows: without normalisation the third discriminant has rho < 0 and is dropped."""
    y = torch.arange(4).repeat_interleave(torch.tensor([400, 100, 30, 10]))
    X = torch.randn(540, D, dtype=torch.float64) + 1.5 * torch.eye(D, dtype=torch.float64)[y]
    theirs = LinearDiscriminantAnalysis(solver="eigen", n_components=3).fit(X.numpy(), y.numpy())
    span = torch.from_numpy(theirs.scalings_[:, :3].copy())
    plain, normalized = (
        linear_optimum(BarlowTwins(), moments_of(X, Labels(y, normalized=normalized)), 3)
        for normalized in (False, True)
    )
    assert (plain.rank, normalized.rank) == (2, 3)
    assert_close(cosines(normalized.W, span), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_barlow_optimum_on_views_is_canonical_correlation_analysis() -> None:
    """Compared with scikit-learn's CCA of the first and second rows of all ordered positive pairs."""
    G = Views(30, 2)
    X = torch.randn(30, D, dtype=torch.float64).repeat(2, 1) + 0.5 * torch.randn(60, D, dtype=torch.float64)
    i, j = G.edges()
    best = linear_optimum(BarlowTwins(), moments_of(X, G), 3)
    theirs = CCA(3, scale=False, max_iter=5000, tol=1e-12).fit(X[i].numpy(), X[j].numpy())
    left, right = theirs.transform(X[i].numpy(), X[j].numpy())
    correlations = torch.tensor(
        [float(torch.corrcoef(torch.from_numpy(pair.T))[0, 1]) for pair in zip_columns(left, right)]
    )
    k = int((best.eigenvalues > 0).sum())
    assert k == 3
    dense = (
        torch.linalg.eigvals(torch.linalg.solve(*reversed(pair_moments(X, i, j))))
        .real.sort(descending=True)
        .values
    )
    assert_close(best.eigenvalues, dense[:3], rtol=1e-8, atol=0)
    signed = dense[dense.abs().argsort(descending=True)][:3]  # CCA has no sign: it takes the largest |rho|
    assert_close(correlations.double(), signed.abs(), rtol=1e-4, atol=1e-4)
    assert (signed > 0).all()
    span = torch.from_numpy(theirs.x_rotations_.copy())
    assert_close(cosines(best.W, span), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4)


def zip_columns(left: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    return [np.stack([left[:, k], right[:, k]], 1) for k in range(left.shape[1])]


def pair_moments(X: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    left, right = X[i] - X[i].mean(0), X[j] - X[j].mean(0)
    return left.T @ right, left.T @ left


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_spectral_optimum_is_multidimensional_scaling_in_range_of_x(G: Relation, center: bool) -> None:
    """The range of centred X, or of X with a constant column (the bias)."""
    X = data()
    best = linear_optimum(SpectralContrastive("sum", center), moments_of(X, G), 4)
    columns = X - X.mean(0) if center else torch.cat([X, torch.ones(N, 1, dtype=torch.float64)], 1)
    U = torch.linalg.svd(columns, full_matrices=False)[0]
    g, q = torch.linalg.eigh(U.T @ G.dense(torch.float64) @ U)
    Z = X @ best.W + best.bias
    expected = (U @ q.flip(1)[:, :4] * g.flip(0)[:4].clamp(min=0)) @ (U @ q.flip(1)[:, :4]).T
    assert_close(Z @ Z.T, expected, rtol=1e-6, atol=1e-6)
    assert center == bool(Z.mean(0).abs().max() < 1e-9)


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
@pytest.mark.parametrize(
    "loss",
    [
        VICReg(2.0, 2.0, 0.4, variance="squared"),
        VICReg(2.0, 4.0, 2.0, variance="squared"),
        SpectralContrastive(),
        SpectralContrastive("sum"),
        SpectralContrastive("sum", center=True),
        WMSE(unit_rows=False),
    ],
    ids=["vicreg", "vicreg beta>alpha", "spectral", "spectral sum", "spectral centred", "wmse"],
)
def test_exact_linear_optimum_is_reached_but_not_beaten_by_descent(loss: Loss, G: Relation) -> None:
    X, K = data(), 3
    best = linear_optimum(loss, moments_of(X, G), K)
    assert best.kind == EXACT
    assert_close(float(loss(X @ best.W + best.bias, G)), best.value, rtol=1e-6, atol=1e-9)
    Q, _ = torch.linalg.qr(
        torch.cat([X, torch.ones(N, 1, dtype=torch.float64)], 1)
    )  # the same model, better conditioned
    reached = []
    for start in range(3):
        W = (torch.randn(D + 1, K, dtype=torch.float64) * 10.0 ** (start - 1)).requires_grad_()
        solver = torch.optim.LBFGS(
            [W], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def objective(W: Tensor = W, solver: torch.optim.LBFGS = solver) -> Tensor:
            solver.zero_grad()
            value = loss(Q @ W, G)
            value.backward()
            return value

        solver.step(objective)
        reached.append(float(loss(Q @ W.detach(), G)))
    assert min(reached) >= best.value - 1e-6 * abs(best.value)
    assert min(reached) <= best.value + 1e-6 * max(abs(best.value), 1e-3)


@pytest.mark.parametrize("name", RELATIONS)
def test_linear_upper_bound_is_labelled_and_attained(name: str) -> None:
    X, G = data(), RELATIONS[name]
    m, Xc = moments_of(X, G), X - X.mean(0)
    losses = (
        VICReg(2.0, 1.0, 0.4, variance="squared"),
        VICReg(2.0, 1.0, 0.4),
        BarlowTwins(0.01),
        BarlowTwins(0.01, center=True),
    )
    for loss in losses:
        for ridge in (0.0, 0.2):
            best = linear_optimum(loss, m, 4, ridge)
            assert best.kind == UPPER
            assert_close(float(loss(Xc @ best.W, G)), best.value, rtol=1e-6, atol=1e-9)
            assert_close(torch.linalg.svdvals(Xc @ best.W), best.singular_values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        VICReg(2.0, 2.0, 0.4, variance="squared"),
        WMSE(unit_rows=False),
        SpectralContrastive(center=True),
        BarlowTwins(0.01),
    ],
    ids=["vicreg", "wmse", "spectral", "barlow"],
)
def test_ridge_does_not_select_a_direction_without_variance(loss: Loss) -> None:
    G = Views(N // 2, 2)
    noise = 0.7 * torch.randn(N, D, dtype=torch.float64)
    X = torch.randn(N // 2, D, dtype=torch.float64).repeat(2, 1) + noise
    dead = 1e-3 * torch.randn(N // 2, 1, dtype=torch.float64).repeat(2, 1)  # equal in both views
    m = moments_of(torch.cat([X, dead], 1), G)
    without, ridged = (linear_optimum(loss, m, 3, ridge) for ridge in (0.0, 0.1))
    variances = [(best.W.T @ m.XHX @ best.W).diagonal() for best in (without, ridged)]
    of_dead = [(best.W[-1] * 1e-3).square() for best in (without, ridged)]
    assert (of_dead[0] * N / variances[0]).max() > 0.5  # it is the best direction, as views do not change it
    assert (of_dead[1] * N / variances[1]).max() < 0.01
    assert variances[1].min() > 0.1 * variances[1].max()  # no column of Z collapses
    assert without.value < ridged.value
    if not isinstance(loss, WMSE):  # which cannot whiten Z = 0
        assert ridged.value < value_of(ridged.loss, m.transform(torch.zeros_like(ridged.W)))


def test_ridge_of_vicreg_solves_the_penalised_problem() -> None:
    m, r, K = moments_of(data(), RELATIONS["views"]), 0.3, 3
    A, B = m.XDX - m.XGX, m.XHX
    penalised = A + r * B.trace() / D * torch.eye(D, dtype=torch.float64)
    _, vectors = scipy.linalg.eigh(B.numpy(), penalised.numpy())
    w = torch.from_numpy(vectors[:, ::-1][:, :K].copy())
    best = linear_optimum(VICReg(2.0, 2.0, 0.1, variance="squared"), m, K, ridge=r)
    assert_close(cosines(best.W, w), torch.ones(K, dtype=torch.float64))
    mu = (w * (A @ w)).sum(0) / (w * (B @ w)).sum(0)
    assert_close(best.eigenvalues, mu)
    assert_close((best.W.T @ B @ best.W).diagonal() / (N - 1), 1 - 0.1 * (N - 1) / (N * 2.0) * mu)


@pytest.mark.parametrize(
    "loss", [VICReg(2.0, 2.0, 0.4, variance="squared"), SpectralContrastive(), BarlowTwins(0.01)]
)
def test_linear_optimum_does_not_depend_on_units(loss: Loss) -> None:
    X, G = data(), RELATIONS["views"]
    units = 10.0 ** torch.arange(-3, 4).double()
    assert_close(
        linear_optimum(loss, moments_of(X * units, G), 4).value,
        linear_optimum(loss, moments_of(X, G), 4).value,
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize(
    "loss", [VICReg(2.0, 2.0, 0.4, variance="squared"), SpectralContrastive("sum"), BarlowTwins(0.01)]
)
def test_linear_optimum_is_precise_for_wide_spectrum_and_deficient_rank(loss: Loss) -> None:
    """float32 features with variances down to 1e-7 of the largest, and fewer rows than columns."""
    for rows, columns in ((400, 60), (40, 60)):
        basis = torch.linalg.qr(torch.randn(columns, columns))[0]
        X = (torch.randn(rows, columns) * 10 ** torch.linspace(0, -3.5, columns)) @ basis + 5
        G, moments = Views(rows // 2, 2), Moments(columns, CPU)
        moments.add(X, G)
        best = linear_optimum(loss, moments.centred(), 8)
        value = float(loss(X.double() @ best.W + best.bias, G))
        assert_close(best.value, value, rtol=1e-6, atol=1e-7)
        Xc = X.double() - X.double().mean(0)
        W = torch.linalg.lstsq(Xc, torch.randn(rows, 8, dtype=torch.float64)).solution
        assert value < float(loss(Xc @ W, G))
    if isinstance(loss, BarlowTwins):
        assert best.eigenvalues.max() <= 1 + 1e-9
    if isinstance(loss, VICReg):
        assert best.eigenvalues.min() >= -1e-9


def test_directions_without_variance_are_dropped() -> None:
    X = torch.cat([data(), torch.ones(N, 2, dtype=torch.float64), torch.zeros(N, 1, dtype=torch.float64)], 1)
    X[:, 7] = X[:, 0] - X[:, 1]
    for loss in (VICReg(1.0, 1.0, 1e-3, variance="squared"), SimCLR(), BarlowTwins()):
        best = linear_optimum(loss, moments_of(X, RELATIONS["views"]), 9)
        assert best.W.shape == (10, 9)
        assert int(best.eigenvalues.isfinite().sum()) == 7
        assert best.rank <= 7
        assert best.W.isfinite().all()


def test_linear_optimum_of_unregistered_loss_raises() -> None:
    class Other(Loss):
        def _terms(self, Z, G):
            return {}

    with pytest.raises(
        NotImplementedError, match=r"Other has no closed form.*theory\.linear_optimum\.register"
    ):
        linear_optimum(Other(), moments_of(data(), RELATIONS["views"]), 2)


class WithoutCovariance(VICReg):
    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return super()._terms(Z, G) | {"covariance": Z.new_zeros(())}


def test_linear_optimum_is_not_inherited_by_subclass() -> None:
    moments, loss = moments_of(data(), RELATIONS["views"]), WithoutCovariance(variance="squared")
    check_linear_optimum(VICReg())
    for closed_form in (check_linear_optimum, lambda loss: linear_optimum(loss, moments, 2)):
        with pytest.raises(NotImplementedError, match="WithoutCovariance has no closed form for a linear"):
            closed_form(loss)
    with pytest.raises(NotImplementedError, match="WithoutCovariance is not known as a function of second"):
        value_of(loss, moments)


def test_closed_form_solver_accepts_registered_custom_loss() -> None:
    """A loss min |Z'Z/N - I|_F^2, solved by any W that whitens X."""

    class Whitening(Loss):
        def __init__(self) -> None:
            super().__init__()
            self.weights = {"distance": 1.0}

        def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
            return {"distance": (Z.T @ Z / len(Z) - torch.eye(Z.shape[1]).to(Z)).square().sum()}

    with pytest.raises(UsageError, match="Whitening has no closed form for a linear model"):
        ClosedForm.check_loss(Whitening(), FromViews())

    @value_of.register
    def whitening_value(loss: Whitening, Z: CentredMoments) -> float:
        return float((Z.about_zero().XHX / Z.N - torch.eye(len(Z.mean)).double()).square().sum())

    @linear_optimum.register
    def whitening_optimum(
        loss: Whitening, moments: CentredMoments, K: int, ridge: float = 0.0
    ) -> LinearOptimum:
        variances, V = torch.linalg.eigh(moments.XHX / moments.N)
        W = V[:, -K:] / variances[-K:].sqrt()
        return build_linear_optimum("whitening", loss, EXACT, moments, W, variances[-K:], K)

    ClosedForm.check_loss(Whitening(), FromViews())
    X, G = data(), RELATIONS["views"]
    best = linear_optimum(Whitening(), moments_of(X, G), 3)
    assert best.kind == EXACT
    assert_close(float(Whitening()(X @ best.W + best.bias, G)), best.value, rtol=0, atol=1e-9)
    assert_close(best.value, 0.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_value_from_moments_equals_loss_for_any_mean(G: Relation) -> None:
    """Losses with and without centring, for a nonzero mean and unequal degrees."""
    X, W, mean = (
        data(),
        torch.randn(D, 3, dtype=torch.float64),
        torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64),
    )
    Z = (X - X.mean(0)) @ W + mean
    for loss in (*LOSSES, SpectralContrastive("sum", center=True), BarlowTwins(0.1, center=True)):
        assert_close(
            value_of(loss, moments_of(X, G).transform(W, mean)), float(loss(Z, G)), rtol=1e-6, atol=1e-9
        )
