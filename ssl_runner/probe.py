"""Probes of frozen features: what a linear classifier and the nearest neighbours can read from a backbone in eval mode."""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from ssl_runner import distributed
from ssl_runner.dataset import DataSet, Images
from ssl_runner.views import normalize, to_unit

STRENGTHS = [10.0 ** (-exponent / 2) for exponent in range(1, 10)]  # 0.3 .. 3e-5, strongest first
NEIGHBORS = [1, 5, 10, 20, 50, 100, 200]
TEMPERATURE = 0.07  # of the neighbours' votes, as in Wu et al. 2018


@torch.no_grad()
def extract(network: nn.Module, images: Images, mean: Tensor, std: Tensor, batch_size: int = 512) -> Tensor:
    """Features (n, d) float32 of the images, unaugmented, from the network in eval mode; every module's mode is put back. Several
    processes compute batches in turn, and all get all features."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        rows = distributed.dealt(len(images), batch_size)
        batches = images.batches(rows[distributed.rank()], batch_size, mean.device)
        parts = [network(normalize(to_unit(x), mean, std)).flatten(1) for x, _ in batches]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return distributed.assembled(torch.cat(parts).float(), rows)


def probe(features: str, network: nn.Module, data: DataSet, probes: Sequence[str], score_test: bool) -> Iterator[dict[str, Any]]:
    """Rows of probe.csv for one network, whose features are called `features`. Each probe is fitted on `train` and its setting
    chosen on `val`; with `score_test` it is then fitted again on both and scored once on `test`. top1 and top5 are shares in
    [0, 1], top5 None with five classes or less; seconds are those of the probe and of extracting what it was fitted on. Several
    processes fit different probes."""
    start = time.perf_counter()
    X, X_val = (extract(network, part, data.mean, data.std) for part in (data.train, data.val))
    y, y_val, classes = data.train.y, data.val.y, len(data.classes)
    extraction = time.perf_counter() - start
    X_test = extract(network, data.test, data.mean, data.std) if score_test else None

    def fit(name: str) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        Probe = PROBES[name]
        chosen, scores = best_of(Probe(X, y, classes).path(X_val), y_val)
        selection = f"{Probe.setting}={chosen:g} (val)"
        row: dict[str, Any] = {"probe": name, "features": features, "train_split": "train", "eval_split": "val"}
        row |= {"selection": selection, "n_train": len(y)}
        yield row | accuracies(scores, y_val) | {"seconds": extraction + time.perf_counter() - start}
        if X_test is not None:
            X_both, y_both = torch.cat([X, X_val]), torch.cat([y, y_val])
            scores = Probe(X_both, y_both, classes).scores(chosen, X_test)
            row |= {"train_split": "train+val", "eval_split": "test", "n_train": len(y_both)}
            yield row | accuracies(scores, data.test.y) | {"seconds": extraction + time.perf_counter() - start}

    W = distributed.size()
    rows = distributed.collect([list(fit(name)) for name in probes[distributed.rank() :: W]])
    for number in range(len(probes)):
        yield from rows[number % W][number // W]


def principal_components(data: DataSet, K: int) -> nn.Module:
    """PCA of the training images' pixels, as a network: images (B, C, H, W) -> their first K coordinates (B, K)."""
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    mean = X.mean(0)
    X = X - mean
    directions = torch.linalg.eigh((X.T @ X).cpu().double()).eigenvectors.flip(1)[:, :K]
    return _projection(directions.to(X), mean)


def discriminants(data: DataSet) -> nn.Module:
    """Linear discriminant analysis of the training images' pixels (scikit-learn's), as a network with one column less than there
    are classes: the supervised optimum of a linear model."""
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    fitted = LinearDiscriminantAnalysis(solver="svd").fit(X.cpu().double().numpy(), data.train.y.cpu().numpy())
    return _projection(torch.from_numpy(fitted.scalings_).to(X), torch.from_numpy(fitted.xbar_).to(X))


def _projection(directions: Tensor, mean: Tensor) -> nn.Module:
    """Images (B, C, H, W) -> (pixels - mean) @ directions (B, K)."""
    matrix = nn.Linear(*directions.shape, device=directions.device)  # type: ignore[misc]
    with torch.no_grad():
        matrix.weight.copy_(directions.T)
        matrix.bias.copy_(-mean @ directions)
    return nn.Sequential(nn.Flatten(), matrix)


def best_of(path: Iterable[tuple[float, Tensor]], y: Tensor, patience: int = 2) -> tuple[float, Tensor]:
    """The setting of the best top-1 (the earlier in a tie) and its scores (n, classes), from (setting, scores) in order; stops
    when `patience` settings in a row are no better."""
    best, worse = (-1.0, 0.0, torch.empty(0)), 0
    for setting, scores in path:
        top1 = accuracies(scores, y)["top1"] or 0.0
        best, worse = ((top1, setting, scores), 0) if top1 > best[0] else (best, worse + 1)
        if worse == patience:
            break
    return best[1], best[2]


def accuracies(scores: Tensor, y: Tensor) -> dict[str, float | None]:
    """scores (n, classes), y (n,) -> the share of rows whose class is the first, and among the first five."""
    ranked = scores.topk(min(5, scores.shape[1])).indices == y[:, None]
    top5 = ranked.any(1).sum().item() / len(y) if scores.shape[1] > 5 else None
    return {"top1": ranked[:, 0].sum().item() / len(y), "top5": top5}


class LinearProbe:
    """Multinomial logistic regression on standardised features, to convergence: the minimum over W (d, classes) and b of

        mean cross-entropy + l2 / 2 |W|^2

    by L-BFGS. The Hessian is at most (X'X / 2n + l2 I) for every class (Boehning 1992), so L-BFGS runs on L'W with LL' about
    this matrix: a few dozen passes over X where it would need hundreds.
    """

    setting = "l2"

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.mean, std = X.mean(0), X.std(0)
        self.scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)  # a feature that never varies says nothing
        self.X, self.y, self.classes = self.standardise(X), y, classes
        self.gram = (self.X.T @ self.X / len(X)).cpu().double()
        self.W = X.new_zeros(X.shape[1], classes)
        self.b = X.new_zeros(classes)

    def standardise(self, X: Tensor) -> Tensor:
        return (X - self.mean) * self.scale

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """(l2, scores (n, classes)) from the strongest penalty to the weakest, each fit starting from the one before."""
        for l2 in STRENGTHS:
            yield l2, self.scores(l2, X_eval)

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """The fit at `l2` from wherever the last one ended -> the logits (n, classes) of X_eval (n, d)."""
        self.fit(l2)
        return self.standardise(X_eval) @ self.W + self.b

    def fit(self, l2: float, tolerance: float = 1e-5, max_passes: int = 2000) -> int:
        """Minimises until no entry of the preconditioned gradient exceeds `tolerance`; returns the passes over X that it took.
        Warns when `max_passes` end it; float32 may end it a little sooner, where no step makes the objective any smaller."""
        eye = torch.eye(len(self.gram), dtype=torch.float64)
        jitter = 1e-7 * self.gram.trace()  # the Gram matrix carries float32 roundings; the minimum does not depend on L
        L = torch.linalg.cholesky(self.gram / 2 + (l2 + jitter) * eye).to(self.X)
        V, b = (L.T @ self.W).requires_grad_(), self.b.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [V, b],
            max_iter=max_passes,
            max_eval=max_passes,
            tolerance_grad=tolerance,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        passes = 0

        def objective() -> Tensor:
            nonlocal passes
            passes += 1
            solver.zero_grad()
            W = torch.linalg.solve_triangular(L.T, V, upper=True)
            value = F.cross_entropy(self.X @ W + b, self.y) + l2 / 2 * W.square().sum()
            value.backward()
            return value

        solver.step(objective)
        self.W, self.b = torch.linalg.solve_triangular(L.T, V.detach(), upper=True), b.detach()
        if passes >= max_passes:
            warnings.warn(f"the linear probe at l2={l2:g} has not converged after {passes} passes", stacklevel=2)
        return passes


class NeighborProbe:
    """k nearest neighbours by cosine, voting with weights exp(cosine / 0.07) (Wu et al. 2018)."""

    setting = "k"

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.X, self.y, self.classes = F.normalize(X), y, classes

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """(k, scores (n, classes)) for every k of NEIGHBORS that there are rows for."""
        settings = [k for k in NEIGHBORS if k <= len(self.X)]
        cosines, neighbors = self.nearest(settings[-1], X_eval)
        for k in settings:
            yield k, self.votes(cosines[:, :k], neighbors[:, :k])

    def scores(self, k: float, X_eval: Tensor) -> Tensor:
        """The votes (n, classes) of the k nearest rows for each row of X_eval (n, d)."""
        return self.votes(*self.nearest(int(k), X_eval))

    def nearest(self, k: int, X_eval: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
        """Cosines and row numbers (n, k) of the nearest rows, in descending order, a block of X_eval at a time."""
        blocks = [(rows @ self.X.T).topk(k) for rows in F.normalize(X_eval).split(block)]
        return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])

    def votes(self, cosines: Tensor, neighbors: Tensor) -> Tensor:
        weights = (cosines / TEMPERATURE).exp()
        return weights.new_zeros(len(weights), self.classes).scatter_add_(1, self.y[neighbors], weights)


PROBES: dict[str, type[LinearProbe] | type[NeighborProbe]] = {"linear": LinearProbe, "knn": NeighborProbe}
