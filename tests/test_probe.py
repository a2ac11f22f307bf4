"""Probes compared with scikit-learn, their side effects on the network, and the data splits they use."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_runner.errors import UsageError
from ssl_runner.probe import affordable, knn, linear, protocol
from ssl_runner.probe.knn import KnnProbe
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.protocol import accuracies, best_of, evaluate, extract
from ssl_runner.probe.ridge import RidgeProbe
from tests.helpers import load, toy

CLASSIFIERS = {"linear": LinearProbe, "knn": KnnProbe, "ridge": RidgeProbe}


def blobs(n: int = 300, d: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping classes. The features are correlated and have very different scales."""
    y = torch.arange(n) % classes
    X = torch.randn(n, d) + torch.randn(classes, d)[y]
    return (X @ torch.randn(d, d)) * torch.logspace(-3, 3, d) + 5, y


def standardised(X: Tensor) -> Tensor:
    return (X.double() - X.double().mean(0)) / X.double().std(0)


def logistic(l2: float, X: Tensor, y: Tensor) -> LogisticRegression:
    """Minimise the objective of the linear probe with scikit-learn."""
    return LogisticRegression(C=1 / (l2 * len(X)), tol=1e-10, max_iter=10_000).fit(
        standardised(X).numpy(), y.numpy()
    )


def objective(X: Tensor, y: Tensor, W: Tensor, b: Tensor, l2: float) -> Tensor:
    return (
        F.cross_entropy(F.linear(standardised(X), W.double(), b.double()), y)
        + l2 / 2 * W.double().square().sum()
    )


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("block", [64, 4096])
def test_linear_probe_matches_scikit_learn(l2: float, block: int, monkeypatch) -> None:
    monkeypatch.setattr(linear, "BLOCK_ON_CPU", block)
    X, y = blobs()
    ours, theirs = LinearProbe(X, y, 3), logistic(l2, X, y)
    ours.fit(l2)
    best = objective(X, y, torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), l2)
    assert_close(objective(X, y, ours.W, ours.b, l2), best, rtol=1e-5, atol=0)
    agreement = ours.scores(l2, X).argmax(1).numpy() == theirs.predict(standardised(X).numpy())
    assert agreement.mean() > 0.995


def test_linear_path_is_close_to_scikit_learn() -> None:
    """Correlated, rectified features: path fits within 1e-3 nats of the minimum, final fit within 1e-5."""
    y = torch.arange(2000) % 5
    X = (torch.randn(2000, 30) + 0.2 * torch.randn(5, 30)[y]) @ torch.randn(30, 60)
    X = X.relu()
    ours = LinearProbe(X, y, 5)
    for l2, _ in ours.path(X):
        theirs = logistic(l2, X, y)
        best = objective(X, y, torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), l2)
        assert_close(objective(X, y, ours.W, ours.b, l2), best, rtol=0, atol=1e-3)
    ours.fit(l2)
    assert_close(objective(X, y, ours.W, ours.b, l2), best, rtol=0, atol=1e-5)


def test_constant_feature_does_not_change_scores() -> None:
    X, y = blobs()
    with_constant = torch.cat([X, torch.full((len(X), 1), 1000.1)], 1)
    for Probe, atol in ((LinearProbe, 1e-2), (RidgeProbe, 1e-5)):
        scores = Probe(with_constant, y, 3).scores(0.01, with_constant)
        assert_close(scores, Probe(X, y, 3).scores(0.01, X), atol=atol, rtol=0)


def test_linear_probe_frees_its_features() -> None:
    """An autograd graph that outlives the probe would keep the features in memory."""
    ours = LinearProbe(*blobs(), 3)
    ours.fit(0.01)
    features = weakref.ref(ours.X)
    del ours
    gc.collect()
    assert features() is None


def test_linear_and_ridge_probe_fit_more_features_than_rows() -> None:
    X, y = torch.randn(30, 100), torch.arange(30) % 3
    ours = LinearProbe(X, y, 3)
    for l2 in linear.PENALTIES:
        assert ours.fit(l2) < 1000
        assert ours.W.isfinite().all()
    assert ours.scores(l2, X).argmax(1).equal(y)
    assert RidgeProbe(X, y, 3).scores(1e-6, X).argmax(1).equal(y)


@pytest.mark.parametrize("Probe", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_single_class_gives_finite_scores(Probe: type) -> None:
    X, _ = blobs(30)
    for _, scores in Probe(X, torch.zeros(30, dtype=torch.long), 1).path(X):
        assert scores.shape == (30, 1)
        assert scores.isfinite().all()


@pytest.mark.parametrize("Probe", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_class_without_rows_is_never_predicted(Probe: type) -> None:
    X, y = blobs()
    for _, scores in Probe(X, y, 4).path(X):
        assert scores.shape == (len(X), 4)
        assert not scores.isnan().any()
        assert (scores.argmax(1) < 3).all()


@pytest.mark.parametrize("Probe", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_constant_features_reach_one_class(Probe: type) -> None:
    X, y = torch.ones(30, 4), torch.arange(30) % 3
    for _, scores in Probe(X, y, 3).path(X):
        assert not scores.isnan().any()
        assert accuracies(scores, y)["top1"] == 10 / 30


@pytest.mark.parametrize("Probe", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_probe_is_bitwise_reproducible(Probe: type) -> None:
    X, y = blobs()
    for (_, one), (_, other) in zip(Probe(X, y, 3).path(X), Probe(X, y, 3).path(X), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("block", [64, 4096])
def test_ridge_probe_matches_scikit_learn(l2: float, block: int) -> None:
    X, y = blobs()
    Xs = (X.double() - X.double().mean(0)) / X.double().std(0, correction=0)
    theirs = Ridge(l2 * len(X), solver="svd").fit(Xs.numpy(), F.one_hot(y, 3).double().numpy())
    ours = RidgeProbe(X, y, 3, block=block)
    scaled = ours.fit(l2) * X.double().std(0, correction=0)[:, None]
    assert_close(scaled, torch.from_numpy(theirs.coef_.T), rtol=1e-7, atol=1e-9)
    assert_close(ours.scores(l2, X).double(), torch.from_numpy(theirs.predict(Xs.numpy())), rtol=0, atol=1e-4)


def test_ridge_path_matches_separate_fits() -> None:
    X, y = blobs()
    ours = RidgeProbe(X, y, 3)
    for l2, scores in ours.path(X):
        assert_close(scores, ours.scores(l2, X))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_probe_matches_scikit_learn(k: int, temperature: float) -> None:
    X, y, X_eval = torch.randn(300, 6), torch.arange(300) % 3, torch.randn(100, 6)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(
        X.double().numpy(), y.numpy()
    )
    ours = KnnProbe(X, y, 3, temperature=temperature).scores(k, X_eval).clamp(min=0)
    assert_close(
        ours / ours.sum(1, keepdim=True),
        torch.from_numpy(theirs.predict_proba(X_eval.double().numpy())).float(),
        atol=1e-3,
        rtol=0,
    )


def test_knn_path_matches_separate_votes() -> None:
    X, y = blobs(60)
    X_eval, _ = blobs(20)
    settings = []
    for k, scores in KnnProbe(X, y, 3).path(X_eval):
        settings.append(k)
        assert_close(scores, KnnProbe(X, y, 3).scores(k, X_eval))
    assert settings == [1, 5, 10, 20, 50]


def test_probe_path_has_the_values_of_its_options() -> None:
    X, y = blobs(60)
    probes = [
        KnnProbe(X, y, 3, neighbors=[2, 7, 80]),
        LinearProbe(X, y, 3, penalties=[0.5, 0.1]),
        RidgeProbe(X, y, 3, penalties=[0.5, 0.1]),
    ]
    assert [[value for value, _ in probe.path(X)] for probe in probes] == [[2, 7], [0.5, 0.1], [0.5, 0.1]]
    with pytest.raises(UsageError, match=r"neighbors=\[80\]: expected an integer from 1 to 60"):
        KnnProbe(X, y, 3, neighbors=[80])


def test_accuracies_top1_and_top5() -> None:
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    assert accuracies(scores, torch.tensor([0, 0, 4, 5])) == {"top1": 0.25, "top5": 0.5}
    assert accuracies(scores[:, :5], torch.tensor([0, 4, 4, 3])) == {"top1": 0.5, "top5": None}


@pytest.mark.parametrize("k", [1, 3, 5, 12])
@pytest.mark.parametrize("temperature", [0.005, 0.5])
def test_knn_accuracies_match_a_naive_vote(k: int, temperature: float) -> None:
    """Coarse features, so that cosines tie and few classes have a vote."""
    X, X_eval = torch.randn(40, 2).sign(), torch.randn(30, 2)
    y, y_eval = torch.arange(40) % 8, torch.arange(30) % 8
    probe = KnnProbe(X, y, 8, temperature=temperature)
    cosines, rows = probe.nearest(k, X_eval)
    hits = {1: 0, 5: 0}
    for row_cosines, row, label in zip(cosines.tolist(), rows.tolist(), y_eval.tolist(), strict=True):
        votes = dict[int, np.float32]()
        for cosine, neighbour in zip(row_cosines, row, strict=True):
            one = int(y[neighbour])
            votes[one] = votes.get(one, np.float32(0)) + np.exp(
                (np.float32(cosine) - np.float32(row_cosines[0])) / np.float32(temperature)
            )
        ranking = sorted(votes, key=lambda one: (-votes[one], one))
        for top in hits:
            hits[top] += label in ranking[:top]
    expected = {"top1": hits[1] / 30, "top5": hits[5] / 30}
    assert accuracies(probe.scores(k, X_eval), y_eval) == expected
    assert k > 1 or expected["top1"] == expected["top5"] < 1


@pytest.mark.parametrize(
    ("scores", "y", "top1", "top5"),
    [
        (torch.zeros(8, 8), torch.arange(8), 1 / 8, 5 / 8),  # equal scores: the lowest numbers come first
        (torch.full((8, 8), torch.nan), torch.arange(8), 0, 0),
        (torch.full((8, 8), -torch.inf), torch.arange(8), 0, 0),
        (torch.tensor([[0.0] * 7 + [torch.nan]]), torch.tensor([0]), 1, 1),
        (torch.tensor([[-torch.inf] * 7 + [-1e9]]), torch.tensor([7]), 1, 1),
        (torch.tensor([[-torch.inf] * 7 + [-1e9]]), torch.tensor([0]), 0, 0),
    ],
)
def test_accuracies_of_ties_and_missing_scores(
    scores: torch.Tensor, y: torch.Tensor, top1: float, top5: float
) -> None:
    assert accuracies(scores, y) == {"top1": top1, "top5": top5}


def test_best_of_stops_without_improvement() -> None:
    y, visited = torch.tensor([0, 1, 0, 1]), []

    def path():
        for setting, right in enumerate([1, 3, 3, 2, 4]):
            visited.append(setting)
            yield setting, F.one_hot(torch.where(torch.arange(4) < right, y, 1 - y), 2).float()

    chosen, scores = best_of(path(), y)
    assert chosen == 1
    assert (scores.argmax(1) == y).sum() == 3
    assert visited == [0, 1, 2, 3]


class Spy(nn.Module):
    """Records at each call whether it is in training or eval mode, and the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.modes: set[bool] = set()
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add(self.training)
        self.batches.append(len(x))
        return self.norm(x).flatten(1)


def test_extract_uses_eval_mode_and_restores_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BATCH_VALUES", 7 * 48 + 1)  # 7 images of the toy data set
    data, spy = load(toy()), Spy().train()
    before = {name: value.clone() for name, value in spy.state_dict().items()}
    features = extract(spy, data.train, data.mean, data.std)
    assert features.shape == (60, 48)
    assert spy.batches == [7] * 8 + [4]
    assert spy.modes == {False}
    assert spy.training
    assert all(torch.equal(value, before[name]) for name, value in spy.state_dict().items())


def test_probe_rows_list_splits_and_training_sizes() -> None:
    data = load(toy())
    rows = list(evaluate("pixels", nn.Flatten(), data, CLASSIFIERS, score_test=True))
    assert [(row["probe"], row["train_split"], row["eval_split"], row["n_train"]) for row in rows] == [
        ("linear", "train", "val", 60),
        ("linear", "train+val", "test", 80),
        ("knn", "train", "val", 60),
        ("knn", "train+val", "test", 80),
        ("ridge", "train", "val", 60),
        ("ridge", "train+val", "test", 80),
    ]
    assert all(row["selection"].endswith("(val)") and row["features"] == "pixels" for row in rows)


def test_probe_without_score_test_does_not_read_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(toy())
    data.test = None
    rows = list(evaluate("backbone", nn.Flatten(), data, {"linear": LinearProbe}, score_test=False))
    assert [row["eval_split"] for row in rows] == ["val"]


def test_selection_is_independent_of_test_labels() -> None:
    """Replacing all test labels by wrong ones does not change the selected hyperparameters."""
    first, second = load(toy()), load(toy())
    second.test.labels = second.test.labels.clone()
    second.test.labels[second.test.indices] = (second.test.y + 1) % 4
    chosen = [
        [row["selection"] for row in evaluate("pixels", nn.Flatten(), d, CLASSIFIERS, True)]
        for d in (first, second)
    ]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("side", "per_class", "left_out"), [(52, 20, False), (53, 20, False), (53, 2100, True)]
)
def test_features_of_many_large_images_are_left_out_with_a_line(
    side: int, per_class: int, left_out: bool
) -> None:
    """3 x 52 x 52 is at most 8,192, 3 x 53 x 53 is more; of the latter at most 8,192 images are probed."""
    data = load(toy(side=side))
    data.train.indices = torch.arange(4 * per_class - len(data.val)) % 60
    names, line = affordable(["backbone", "pixels", "pca", "lda", "backbone"], data)
    assert names == (["backbone"] if left_out else ["backbone", "pixels", "pca", "lda"])
    assert line == (
        "probes of pixels, pca, lda are left out: 8,427 values per image, 8,400 images to fit on and 8 to"
        " test; expected at most 500,000,000 values in all, and at most 8,192 values per image or 8,192"
        " images to fit on"
        if left_out
        else ""
    )


@pytest.mark.parametrize(("n", "left_out"), [(160_000, False), (170_000, True)])
def test_features_of_very_many_small_images_are_left_out(n: int, left_out: bool) -> None:
    """n x 3 x 32 x 32 values, above and below 500 million."""
    data = load(toy(side=32))
    data.train.indices = torch.arange(n) % 60
    names, line = affordable(["backbone", "pixels"], data)
    assert names == (["backbone"] if left_out else ["backbone", "pixels"])
    assert bool(line) == left_out


def test_knn_neighbours_do_not_depend_on_the_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(60)
    whole = KnnProbe(X, y, 3).nearest(5, X)
    monkeypatch.setattr(knn, "BLOCK_ELEMENTS", 180)  # blocks of 3 rows
    in_blocks = KnnProbe(X, y, 3).nearest(5, X)
    assert_close(in_blocks[0], whole[0])
    assert in_blocks[1].equal(whole[1])
