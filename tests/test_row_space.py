"""Probes and baselines in the row space of the features: the same results without a D x D matrix."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_runner.errors import UsageError
from ssl_runner.probe import evaluate_seeded, row_space
from ssl_runner.probe.baselines import discriminants_of_few, linear_discriminants, principal_components
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.ridge import RidgeProbe
from ssl_runner.probe.row_space import RowSpace, moments
from tests.helpers import load, toy

N, D, CLASSES = 40, 130, 3


@pytest.fixture(params=[2**23, 300], ids=["one block", "blocks"], autouse=True)
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_space, "BLOCK_ELEMENTS", request.param)


@pytest.fixture
def wide() -> tuple[Tensor, Tensor]:
    """More features than rows, of different scales, with one constant feature and a repeated row."""
    y = torch.arange(N) % CLASSES
    X = (torch.randn(N, D) + 0.5 * torch.randn(CLASSES, D)[y]) * torch.logspace(-2, 2, D) + 5
    X[:, 7] = 1000.1
    X[1], y[1] = X[0], y[0]
    return X, y


def standardised(X: Tensor, correction: int, of: Tensor) -> np.ndarray:
    std = of.double().std(0, correction=correction)
    return ((X.double() - of.double().mean(0)) / torch.where(std > 1e-9, std, torch.inf)).numpy()


def test_row_space_coordinates_and_basis_reproduce_the_rows(wide) -> None:
    X, _ = wide
    rows = RowSpace(X, *moments(X, 1))
    S = torch.from_numpy(standardised(X, 1, X))
    Q = rows.to_features(torch.eye(len(rows.values)))
    assert rows.coordinates().shape == (N, N - 2)  # centred, and one row is repeated
    assert_close(Q.T @ Q, torch.eye(N - 2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(rows.coordinates() @ Q.T, S, atol=1e-9, rtol=0)
    assert_close(rows.coordinates(), S @ Q, atol=1e-9, rtol=0)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_linear_probe_of_few_rows_matches_scikit_learn(wide, l2: float) -> None:
    X, y = wide
    X_eval = X[:20] + torch.randn(20, D) * X.std(0)
    theirs = LogisticRegression(C=1 / (l2 * N), tol=1e-10, max_iter=10_000).fit(standardised(X, 1, X), y)
    expected = torch.from_numpy(theirs.decision_function(standardised(X_eval, 1, X)))
    got = LinearProbe(X, y, CLASSES).scores(l2, X_eval).double()
    assert_close(got.softmax(1), expected.softmax(1), atol=0.005, rtol=0)
    S = torch.from_numpy(standardised(X, 1, X))
    probe = LinearProbe(X, y, CLASSES)
    probe.fit(l2)
    reached = F.cross_entropy(probe.logits(X).double(), y) + l2 / 2 * probe.W.double().square().sum()
    W, b = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    assert_close(
        reached, F.cross_entropy(F.linear(S, W, b), y) + l2 / 2 * W.square().sum(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-6])
def test_ridge_probe_of_few_rows_matches_scikit_learn(wide, l2: float) -> None:
    X, y = wide
    X_eval = X[:20] + torch.randn(20, D) * X.std(0)
    Y = F.one_hot(y, CLASSES).double().numpy()
    theirs = Ridge(l2 * N, solver="svd").fit(standardised(X, 0, X), Y)
    ours = RidgeProbe(X, y, CLASSES)
    expected = torch.from_numpy(theirs.predict(standardised(X_eval, 0, X))).float()
    assert_close(ours.scores(l2, X_eval), expected, atol=1e-5, rtol=0)
    assert_close(dict(ours.path(X_eval))[1e-6], ours.scores(1e-6, X_eval))
    std = X.double().std(0, correction=0)[:, None]
    assert_close(ours.fit(l2) * std, torch.from_numpy(theirs.coef_.T), atol=1e-8, rtol=1e-6)


def test_ridge_probe_agrees_on_both_sides_of_n_equal_d(wide) -> None:
    """With 20 more features that are constant, the fit is in the row space; they have no influence."""
    X, y = wide
    X = X[:, :30]
    more = torch.cat([X, torch.ones(N, 20)], 1)
    direct, in_row_space = RidgeProbe(X, y, CLASSES), RidgeProbe(more, y, CLASSES)
    assert_close(in_row_space.scores(0.1, more), direct.scores(0.1, X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("Probe", [LinearProbe, RidgeProbe])
@pytest.mark.parametrize("n", [1, 5])
def test_constant_wide_features_give_finite_scores(Probe: type, n: int) -> None:
    X = torch.ones(n, 20)
    for _, scores in Probe(X, torch.arange(n) % 2, 2).path(torch.randn(3, 20)):
        assert scores.isfinite().all()


def pictures(side: int = 6, per_class: int = 12) -> Any:
    source = toy(per_class=per_class, side=side)
    source.images = torch.randint(0, 256, source.images.shape, dtype=torch.uint8)
    return load(source)


def pixels(images: Any, data: Any) -> Tensor:
    x = images.images[images.indices].float() / 255
    return ((x - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)).flatten(1)


def test_pca_of_few_images_matches_scikit_learn() -> None:
    data = pictures()  # 36 images of 108 values
    x = torch.rand(5, 3, 6, 6)
    theirs = PCA(9).fit(pixels(data.train, data).double().numpy())
    expected = torch.from_numpy(theirs.transform(x.flatten(1).double().numpy())).float()
    got = principal_components(data, 9)(x)
    assert_close(got * (got * expected).sum(0).sign(), expected, atol=1e-4, rtol=1e-4)
    assert principal_components(data, 500)(x).shape == (5, 35)


def test_lda_of_few_images_matches_scikit_learn() -> None:
    data = pictures()
    x = torch.rand(5, 3, 6, 6)
    theirs = LinearDiscriminantAnalysis().fit(pixels(data.train, data).double().numpy(), data.train.y.numpy())
    expected = torch.from_numpy(theirs.transform(x.flatten(1).double().numpy())).float()
    got = linear_discriminants(data)(x)
    scale = (expected.norm() / got.norm()).item()  # before 1.9, scikit-learn divides variances by n - classes
    assert scale == pytest.approx(1, abs=1e-3) or scale == pytest.approx((32 / 36) ** 0.5, abs=1e-3)
    got *= scale
    assert_close(got * (got * expected).sum(0).sign(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("side", [2, 6], ids=["many images", "few images"])
@pytest.mark.parametrize("equal", ["images in every class", "means of all classes"])
def test_lda_of_images_without_discriminants_is_left_out_with_a_line(
    side: int, equal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(side)  # 36 images of 12 or 108 values
    if equal.startswith("images"):
        data.train.images[:] = data.train.images[:4][data.train.labels]
    else:
        alternating = data.train.images[:2].clone()
        for label in range(4):
            rows = data.train.indices[data.train.y == label]
            data.train.indices = data.train.indices[~torch.isin(data.train.indices, rows[8:])]
            data.train.images[rows[:8]] = alternating[torch.arange(8) % 2]
    with pytest.raises(UsageError, match=f"probe.features=lda: expected .*, found equal {equal}; leave out"):
        linear_discriminants(data)
    build = partial(linear_discriminants, data)
    rows = list(evaluate_seeded("lda", build, data, {"linear": LinearProbe}, [None], seed=0))
    assert rows == []
    assert capsys.readouterr().out.startswith("probes of lda are left out: probe.features=lda: expected")


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of an operation that is not a view."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def uses() -> Iterator[tuple[str, Any]]:
    yield "linear", lambda X, y: list(LinearProbe(X, y, CLASSES).path(X))
    yield "ridge", lambda X, y: list(RidgeProbe(X, y, CLASSES).path(X))
    yield "lda", lambda X, y: discriminants_of_few(X.clone(), y)


@pytest.mark.parametrize("use", [use for _, use in uses()], ids=[name for name, _ in uses()])
def test_probes_of_few_rows_make_no_square_matrix_of_features(use: Any) -> None:
    """No tensor is larger than X (n, D)."""
    X, y = torch.randn(30, 1000), torch.arange(30) % CLASSES
    with LargestTensor() as largest:
        use(X, y)
    assert 30 * 30 < largest.numel <= 30 * 1000


def test_pca_of_few_images_makes_no_square_matrix_of_pixels() -> None:
    data = pictures(side=18, per_class=8)  # 24 + 8 + 8 images of 972 values
    with LargestTensor() as largest:
        principal_components(data, 5)(torch.rand(5, 3, 18, 18))
    assert largest.numel <= 24 * 972
    assert isinstance(principal_components(data, 5), nn.Sequential)
