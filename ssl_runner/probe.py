"""Evaluation of frozen features by linear, ridge and nearest-neighbour probes; PCA and LDA baselines."""

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
TEMPERATURE = 0.07  # of the kNN votes (Wu et al. 2018)
# rows per block of the linear probe; on a CPU a block fits into the cache unless the features are very wide
BLOCK, BLOCK_ON_CPU = 65536, 2048


@torch.no_grad()
def extract(network: nn.Module, images: Images, mean: Tensor, std: Tensor, batch_size: int = 512) -> Tensor:
    """Return the features (n, d), float32, of n unaugmented images.

    The network runs in eval mode, and the previous mode of every module is restored. Batches are distributed
    round-robin over the ranks, and the features are all-gathered: every rank returns all of them.
    """
    with evaluating(network):
        rows = distributed.dealt(len(images), batch_size)
        batches = images.batches(rows[distributed.rank()], batch_size, mean.device)
        parts = [network(normalize(to_unit(x), mean, std)).flatten(1) for x, _ in batches]
    return distributed.assembled(torch.cat(parts).float(), rows)


def probe(
    features: str, network: nn.Module, data: DataSet, probes: Sequence[str], score_test: bool
) -> Iterator[dict[str, Any]]:
    """Yield the rows of probe.csv for one network. `features` is the name of its features in the table.

    Each probe is fitted on `train`, and its hyperparameter is selected on `val`. With `score_test` it is then
    refitted on train + val and scored once on `test`.

    top1 and top5 are accuracies in [0, 1]; top5 is None for five or fewer classes. `seconds` is the time (s)
    spent on extracting the train and val features, and on fitting and scoring the probe.

    Probes are distributed round-robin over the ranks. Every rank yields all rows.
    """
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
    for i in range(len(probes)):
        yield from rows[i % W][i // W]


def principal_components(data: DataSet, K: int) -> nn.Module:
    """PCA of the pixels of the training images, as a network.

    Images (B, C, H, W) -> coordinates along the first K principal components (B, K).
    """
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    mean = X.mean(0)
    X = X - mean
    directions = torch.linalg.eigh((X.T @ X).cpu().double()).eigenvectors.flip(1)[:, :K]
    return _projection(directions.to(X), mean)


def discriminants(data: DataSet) -> nn.Module:
    """Linear discriminant analysis (scikit-learn) of the pixels of the training images, as a network.

    Images (B, C, H, W) -> (B, classes - 1). The supervised optimum of a linear model.
    """
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    fitted = LinearDiscriminantAnalysis(solver="svd").fit(
        X.cpu().double().numpy(), data.train.y.cpu().numpy()
    )
    return _projection(torch.from_numpy(fitted.scalings_).to(X), torch.from_numpy(fitted.xbar_).to(X))


def _projection(directions: Tensor, mean: Tensor) -> nn.Module:
    """Network for images (B, C, H, W) -> (pixels - mean) @ directions, (B, K).

    directions (C H W, K), mean (C H W,).
    """
    matrix = nn.Linear(*directions.shape, device=directions.device)  # type: ignore[misc]
    with torch.no_grad():
        matrix.weight.copy_(directions.T)
        matrix.bias.copy_(-mean @ directions)
    return nn.Sequential(nn.Flatten(), matrix)


def best_of(path: Iterable[tuple[float, Tensor]], y: Tensor, patience: int = 2) -> tuple[float, Tensor]:
    """Return the hyperparameter with the highest top-1 accuracy, and its scores (n, classes).

    `path` yields (hyperparameter, scores) in order. Ties go to the earlier one. The search stops after
    `patience` consecutive values without improvement.
    """
    best, worse = (-1.0, 0.0, torch.empty(0)), 0
    for setting, scores in path:
        top1 = accuracies(scores, y)["top1"] or 0.0
        best, worse = ((top1, setting, scores), 0) if top1 > best[0] else (best, worse + 1)
        if worse == patience:
            break
    return best[1], best[2]


def accuracies(scores: Tensor, y: Tensor) -> dict[str, float | None]:
    """Return top-1 and top-5 accuracy in [0, 1] for scores (n, classes) and labels y (n,).

    top5 is None for five or fewer classes.
    """
    ranked = scores.topk(min(5, scores.shape[1])).indices == y[:, None]
    top5 = ranked.any(1).sum().item() / len(y) if scores.shape[1] > 5 else None
    return {"top1": ranked[:, 0].sum().item() / len(y), "top5": top5}


def logits(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Logits (classes, n) of X (n, d) for W (classes, d), b (classes,).

    Transposed because a softmax over a short contiguous dimension is slow.
    """
    return F.linear(X, W, b).T.contiguous()


class LinearProbe:
    """Multinomial logistic regression on standardised features X (n, d) with labels y (n,).

    L-BFGS minimises, over W (classes, d) and b (classes,),

        mean cross-entropy + l2 / 2 |W|^2

    Preconditioning: if all rows had the same predicted probabilities p, the Hessian of each class would be
    approximately a X'X / n + l2 I, where a is the mean of (1 - |p|^2) / (classes - 1). L-BFGS therefore
    optimises V = W L, where LL' is this matrix and a is computed at the starting point.

    A fit has converged when no entry of the gradient with respect to V exceeds a tolerance in absolute value.
    TIGHT, the tolerance of the final fit, brings the objective within 1e-5 nats of scikit-learn's optimum.
    LOOSE, the tolerance of model selection, brings it within 1e-3 nats. The tests check both bounds.
    """

    setting = "l2"
    LOOSE, TIGHT = 1e-3, 1e-4

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.origin = X[0].clone()  # makes constant features exactly 0
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
        """Standardise X (n, d) with the mean and scale of the training features."""
        return (X - self.origin).sub_(self.mean).mul_(self.scale)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (l2, logits (n, classes) of X_eval (n, d)), strongest penalty first, with warm starts."""
        X_eval = self.standardise(X_eval)
        for l2 in STRENGTHS:
            self.fit(l2, self.LOOSE)
            yield l2, F.linear(X_eval, self.W, self.b)

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """Fit at `l2`, starting from the previous fit; return the logits (n, classes) of X_eval (n, d)."""
        self.fit(l2)
        return F.linear(self.standardise(X_eval), self.W, self.b)

    @torch.no_grad()
    def fit(self, l2: float, tolerance: float = TIGHT, max_passes: int = 2000) -> int:
        """Minimise the objective at `l2` to `tolerance` and return the number of passes over X.

        Warns if `max_passes` is reached. In float32 the solver may stop slightly above `tolerance`, when no
        step decreases the objective any further.
        """
        squares = sum(logits(X, self.W, self.b).softmax(0).square().sum() for X, _, _ in self.blocks)
        a = (1 - float(squares) / len(self.X)) / max(len(self.b) - 1, 1) + 1e-6
        # the Gram matrix has float32 rounding errors; the minimum does not depend on L
        jitter = 1e-7 * self.gram.trace()
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
            W = W.contiguous()  # solve_triangular returns column-major order, which makes products 2x slower
            return W, V[:, -1] / a**0.5

        @torch.no_grad()  # the solver enables gradients
        def objective() -> Tensor:
            nonlocal passes
            passes += 1
            W, b = weights()
            dW, db, values = l2 * W, torch.zeros_like(b), [l2 / 2 * W.square().sum()]
            for X, y, rows in self.blocks:
                log_p = logits(X, W, b).log_softmax(0)
                values.append(-log_p[y, rows].sum() / len(self.X))
                # R (classes, block) is the gradient with respect to the logits, (p - one_hot(y)) / n
                R = log_p.exp_().div_(len(self.X))
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
                f"linear probe: L-BFGS did not converge at l2={l2:g} after {passes} passes over the features",
                stacklevel=2,
            )
        return passes


class RidgeProbe:
    """Ridge regression of one-hot labels Y (n, classes) on standardised features X (n, d).

    The minimum over W (d, classes) and b (classes,) of

        1 / 2n |X W + 1 b' - Y|^2 + l2 / 2 |W|^2

    With X centred, it is W = (X'X / n + l2 I)^-1 X'Y / n and b = mean of Y.

    One eigendecomposition of X'X / n serves every l2. The moments are accumulated in float64 (float32 on MPS)
    over blocks of rows.
    """

    setting = "l2"

    def __init__(self, X: Tensor, y: Tensor, classes: int, block: int = 4096):
        dtype = torch.float32 if X.device.type == "mps" else torch.float64
        n, d = X.shape
        shift = X[:block].to(dtype).mean(0)  # close to the mean: avoids cancellation in the products
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
        # Q maps features to principal components
        self.values, self.Q = values.clamp(min=0).to(mean), scale[:, None] * Q.to(mean)
        self.C = self.Q.T @ YX.T  # (d, classes)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (l2, predictions (n, classes) for X_eval (n, d)), strongest penalty first."""
        X_eval = X_eval - self.mean.to(X_eval)
        for l2 in RIDGES:
            yield l2, X_eval @ self.fit(l2).to(X_eval) + self.b

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """Return the predictions (n, classes) for X_eval (n, d) of the fit at `l2`."""
        return (X_eval - self.mean.to(X_eval)) @ self.fit(l2).to(X_eval) + self.b

    def fit(self, l2: float) -> Tensor:
        """Return W (d, classes) at `l2`, for features that are centred but not scaled."""
        return self.Q @ (self.C / (self.values + l2)[:, None])


class NeighborProbe:
    """k nearest neighbours by cosine similarity, with vote weights exp(cosine / 0.07) (Wu et al. 2018)."""

    setting = "k"

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.X, self.y, self.classes = F.normalize(X), y, classes

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (k, votes (n, classes) for X_eval (n, d)) for each k in NEIGHBORS, in ascending order.

        Skips each k larger than the number of training rows.
        """
        settings = [k for k in NEIGHBORS if k <= len(self.X)]
        cosines, neighbors = self.nearest(settings[-1], X_eval)
        for k in settings:
            yield k, self.votes(cosines[:, :k], neighbors[:, :k])

    def scores(self, k: float, X_eval: Tensor) -> Tensor:
        """Return the votes (n, classes) of the k nearest training rows for each row of X_eval (n, d)."""
        return self.votes(*self.nearest(int(k), X_eval))

    def nearest(self, k: int, X_eval: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
        """Return cosines and row indices (n, k) of the nearest training rows, by descending cosine.

        Processes X_eval in blocks of rows.
        """
        blocks = [(rows @ self.X.T).topk(k) for rows in F.normalize(X_eval).split(block)]
        return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])

    def votes(self, cosines: Tensor, neighbors: Tensor) -> Tensor:
        """Sum the vote weights per class: cosines and row indices (n, k) -> (n, classes)."""
        weights = (cosines / TEMPERATURE).exp()
        return weights.new_zeros(len(weights), self.classes).scatter_add_(1, self.y[neighbors], weights)


PROBES: dict[str, type[LinearProbe] | type[NeighborProbe] | type[RidgeProbe]] = {
    "linear": LinearProbe,
    "knn": NeighborProbe,
    "ridge": RidgeProbe,
}
