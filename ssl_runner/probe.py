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
from ssl_runner.backbone import evaluating
from ssl_runner.dataset import DataSet, Images
from ssl_runner.views import normalize, to_unit

STRENGTHS = [10.0 ** (-exponent / 2) for exponent in range(1, 10)]  # 0.3 .. 3e-5, strongest first
RIDGES = [10.0 ** (1 - exponent / 2) for exponent in range(15)]  # 10 .. 1e-6
NEIGHBORS = [1, 5, 10, 20, 50, 100, 200]
TEMPERATURE = 0.07  # of the neighbours' votes, as in Wu et al. 2018
BLOCK, BLOCK_ON_CPU = (
    65536,
    2048,
)  # rows that a linear probe takes at a time; a cache holds these few, unless they are long


@torch.no_grad()
def extract(network: nn.Module, images: Images, mean: Tensor, std: Tensor, batch_size: int = 512) -> Tensor:
    """Features (n, d) float32 of the images, unaugmented, from the network in eval mode; every module's mode is put back. Several
    processes compute batches in turn, and all get all features."""
    with evaluating(network):
        rows = distributed.dealt(len(images), batch_size)
        batches = images.batches(rows[distributed.rank()], batch_size, mean.device)
        parts = [network(normalize(to_unit(x), mean, std)).flatten(1) for x, _ in batches]
    return distributed.assembled(torch.cat(parts).float(), rows)


def probe(
    features: str, network: nn.Module, data: DataSet, probes: Sequence[str], score_test: bool
) -> Iterator[dict[str, Any]]:
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
        row: dict[str, Any] = {
            "probe": name,
            "features": features,
            "train_split": "train",
            "eval_split": "val",
        }
        row |= {"selection": selection, "n_train": len(y)}
        yield row | accuracies(scores, y_val) | {"seconds": extraction + time.perf_counter() - start}
        if X_test is not None:
            X_both, y_both = torch.cat([X, X_val]), torch.cat([y, y_val])
            scores = Probe(X_both, y_both, classes).scores(chosen, X_test)
            row |= {"train_split": "train+val", "eval_split": "test", "n_train": len(y_both)}
            yield (
                row | accuracies(scores, data.test.y) | {"seconds": extraction + time.perf_counter() - start}
            )

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
    fitted = LinearDiscriminantAnalysis(solver="svd").fit(
        X.cpu().double().numpy(), data.train.y.cpu().numpy()
    )
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


def logits(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """X (n, d), W (classes, d), b (classes,) -> (classes, n), this way round since a softmax along few neighbours is slow."""
    return F.linear(X, W, b).T.contiguous()


class LinearProbe:
    """Multinomial logistic regression on standardised features: the minimum over W (classes, d) and b of

        mean cross-entropy + l2 / 2 |W|^2

    by L-BFGS. Were the predictions p the same for all rows, the Hessian of each class would be near a X'X / n + l2 I with a the
    mean of (1 - |p|^2) / (classes - 1); so L-BFGS runs on V = W L with LL' this matrix, its a that of where it starts.

    Converged means that no entry of the gradient with respect to V exceeds a tolerance. That of the last fit (TIGHT) leaves the
    objective within 1e-5 nats of scikit-learn's, that of the path, which only selects (LOOSE), within 1e-3: so much is tested.
    """

    setting = "l2"
    LOOSE, TIGHT = 1e-3, 1e-4

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.origin = X[0].clone()  # so that a feature that never varies is exactly 0
        self.X = X - self.origin
        self.mean = self.X.mean(0)
        self.X -= self.mean
        gram = self.X.T @ self.X
        std = (gram.diagonal() / (len(X) - 1)).sqrt()
        self.scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        self.X *= self.scale
        self.gram = (self.scale[:, None] * gram * self.scale / len(X)).cpu().double()
        block = BLOCK_ON_CPU if X.device.type == "cpu" else BLOCK
        rows = torch.arange(len(X), device=X.device) % block
        self.blocks = list(zip(self.X.split(block), y.split(block), rows.split(block), strict=True))
        self.W, self.b = X.new_zeros(classes, X.shape[1]), X.new_zeros(classes)

    def standardise(self, X: Tensor) -> Tensor:
        return (X - self.origin).sub_(self.mean).mul_(self.scale)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """(l2, scores (n, classes)) from the strongest penalty to the weakest, each fit starting from the one before."""
        X_eval = self.standardise(X_eval)
        for l2 in STRENGTHS:
            self.fit(l2, self.LOOSE)
            yield l2, F.linear(X_eval, self.W, self.b)

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """The fit at `l2` from wherever the last one ended -> the logits (n, classes) of X_eval (n, d)."""
        self.fit(l2)
        return F.linear(self.standardise(X_eval), self.W, self.b)

    @torch.no_grad()
    def fit(self, l2: float, tolerance: float = TIGHT, max_passes: int = 2000) -> int:
        """Minimises to `tolerance`; returns the passes over X that it took. Warns when `max_passes` end it; float32 may end it a
        little sooner, where no step makes the objective any smaller."""
        squares = sum(logits(X, self.W, self.b).softmax(0).square().sum() for X, _, _ in self.blocks)
        a = (1 - float(squares) / len(self.X)) / max(len(self.b) - 1, 1) + 1e-6
        jitter = (
            1e-7 * self.gram.trace()
        )  # the Gram matrix carries float32 roundings; the minimum does not depend on L
        L = torch.linalg.cholesky(
            a * self.gram + (l2 + jitter) * torch.eye(len(self.gram), dtype=torch.float64)
        ).to(self.X)
        V = torch.cat([self.W @ L, a**0.5 * self.b[:, None]], 1)
        solver = torch.optim.LBFGS(
            [V],
            max_iter=max_passes,
            max_eval=max_passes,
            tolerance_grad=tolerance,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        passes = 0

        def weights() -> tuple[Tensor, Tensor]:
            W = torch.linalg.solve_triangular(L, V[:, :-1], upper=False, left=False)
            W = W.contiguous()  # it comes column by column, and products with that take twice as long
            return W, V[:, -1] / a**0.5

        @torch.no_grad()  # the solver turns gradients on
        def objective() -> Tensor:
            nonlocal passes
            passes += 1
            W, b = weights()
            dW, db, values = l2 * W, torch.zeros_like(b), [l2 / 2 * W.square().sum()]
            for X, y, rows in self.blocks:
                log_p = logits(X, W, b).log_softmax(0)
                values.append(-log_p[y, rows].sum() / len(self.X))
                R = log_p.exp_().div_(
                    len(self.X)
                )  # the gradient with respect to the logits, (p - one_hot(y)) / n
                R[y, rows] -= 1 / len(self.X)
                dW.addmm_(R, X)
                db += R.sum(1)
            dW = torch.linalg.solve_triangular(L.T, dW, upper=True, left=False)
            V.grad = torch.cat([dW, db[:, None] / a**0.5], 1)
            return torch.stack(values).sum()

        solver.step(objective)
        self.W, self.b = weights()
        if passes >= max_passes:
            warnings.warn(
                f"the linear probe at l2={l2:g} has not converged after {passes} passes", stacklevel=2
            )
        return passes


class RidgeProbe:
    """Least squares on one-hot labels Y (n, classes) and standardised features: the minimum over W (d, classes) and b of

        1 / 2n |X W + 1 b' - Y|^2 + l2 / 2 |W|^2,   with X centred   W = (X'X / n + l2 I)^-1 X'Y / n,   b = mean of Y

    for every l2 from one eigendecomposition of X'X / n. The moments are sums over blocks of rows, in float64.
    """

    setting = "l2"

    def __init__(self, X: Tensor, y: Tensor, classes: int, block: int = 4096):
        dtype = torch.float32 if X.device.type == "mps" else torch.float64
        n, d = X.shape
        shift = X[:block].to(dtype).mean(0)  # near the mean, so that the products lose nothing to it
        XX, YX = shift.new_zeros(d, d), shift.new_zeros(classes, d)
        for rows, labels in zip(X.split(block), y.split(block), strict=True):
            rows = rows.to(dtype) - shift
            XX.addmm_(rows.T, rows)
            YX.addmm_(F.one_hot(labels, classes).to(dtype).T, rows)
        self.b = torch.bincount(y, minlength=classes) / n
        mean = YX.sum(0) / n
        self.mean = mean + shift
        XX, YX = XX / n - torch.outer(mean, mean), YX / n - torch.outer(self.b.to(mean), mean)
        std = XX.diagonal().clamp(min=0).sqrt()
        scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        values, Q = torch.linalg.eigh((scale[:, None] * XX * scale).cpu().double())
        self.values, self.Q = (
            values.clamp(min=0).to(mean),
            scale[:, None] * Q.to(mean),
        )  # Q: features -> principal components
        self.C = self.Q.T @ YX.T  # (d, classes)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """(l2, scores (n, classes)) from the strongest penalty to the weakest."""
        X_eval = X_eval - self.mean.to(X_eval)
        for l2 in RIDGES:
            yield l2, X_eval @ self.fit(l2).to(X_eval) + self.b

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """The predictions (n, classes) for X_eval (n, d) by the fit at `l2`."""
        return (X_eval - self.mean.to(X_eval)) @ self.fit(l2).to(X_eval) + self.b

    def fit(self, l2: float) -> Tensor:
        """W (d, classes) at `l2`, for features that are centred but not scaled."""
        return self.Q @ (self.C / (self.values + l2)[:, None])


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


PROBES: dict[str, type[LinearProbe] | type[NeighborProbe] | type[RidgeProbe]] = {
    "linear": LinearProbe,
    "knn": NeighborProbe,
    "ridge": RidgeProbe,
}
