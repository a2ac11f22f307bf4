"""Logistic-regression probe: L-BFGS with a Gram-matrix preconditioner, on a path of L2 penalties."""

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.probe.protocol import Probe
from ssl_runner.probe.row_space import RowSpace, float64, moments

PENALTIES = tuple(10.0 ** (-exponent / 2) for exponent in range(1, 10))  # 0.3 .. 3e-5, strongest first
# rows per block; on a CPU a block fits into the cache unless the features are very wide
BLOCK, BLOCK_ON_CPU = 65536, 2048


def logits(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Logits (classes, n) of X (n, d) for W (classes, d), b (classes,).

    Transposed because a softmax over a short contiguous dimension is slow.
    """
    return F.linear(X, W, b).T.contiguous()


def solve(L: Tensor, V: Tensor, upper: bool) -> Tensor:
    """W with W L = V, or W L' = V for `upper`; L lower triangular (d, d) or diagonal (d,), V (classes, d)."""
    if L.ndim == 1:
        return V / L
    return torch.linalg.solve_triangular(L.T if upper else L, V, upper=upper, left=False)


class StandardisedFeatures:
    """Standardised rows of X (n, d), n >= d, with the interface of `RowSpace`: the coordinates are all d."""

    def __init__(self, X: Tensor):
        self.origin = X[0].clone()  # makes constant features exactly 0
        self.X = X - self.origin
        self.mean = self.X.mean(0)
        self.X -= self.mean
        gram = self.X.T @ self.X
        std = (gram.diagonal() / (len(X) - 1)).sqrt()
        self.scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        self.X *= self.scale
        self.gram = float64(self.scale[:, None] * gram * self.scale / len(X))  # (d, d)

    def coordinates(self) -> Tensor:
        """The standardised rows, (n, d)."""
        return self.X

    def scores(self, W: Tensor, b: Tensor, X: Tensor) -> Tensor:
        """Standardise other rows X (m, d), times W (d, k), plus b (k,): (m, k)."""
        return F.linear((X - self.origin).sub_(self.mean).mul_(self.scale), W.T, b)


class LinearProbe(Probe):
    """Multinomial logistic regression on standardised features X (n, d) with labels y (n,).

    L-BFGS minimises, over W (classes, d) and b (classes,),

        mean cross-entropy + l2 / 2 |W|^2

    Preconditioning: if all rows had the same predicted probabilities p, the Hessian of each class would be
    approximately a X'X / n + l2 I, where a is the mean of (1 - |p|^2) / (classes - 1). L-BFGS therefore
    optimises V = W L, where LL' is this matrix and a is computed at the starting point.

    A fit has converged when no entry of the gradient with respect to V exceeds a tolerance in absolute value.
    TIGHT, the tolerance of the final fit, brings the objective within 1e-5 nats of scikit-learn's optimum.
    LOOSE, the tolerance of model selection, brings it within 1e-3 nats. The tests check both bounds.

    With fewer rows than features, the fit runs in the row space of X (`RowSpace`): d is then the rank of X,
    and W has the coordinates in its basis. The minimum is the same, and no d x d matrix of features is made.

    `penalties` are the values of l2 to select from. Sort them from strong to weak: each fit starts from the
    previous one, and selection stops when the accuracy no longer improves.
    """

    hyperparameter = "l2"
    LOOSE, TIGHT = 1e-3, 1e-4

    def __init__(self, X: Tensor, y: Tensor, classes: int, penalties: Sequence[float] = PENALTIES):
        self.penalties = penalties
        few = len(X) < X.shape[1]
        self.space = RowSpace(X, *moments(X, correction=1)) if few else StandardisedFeatures(X)
        self.X, self.gram = self.space.coordinates().to(X), self.space.gram
        block = BLOCK_ON_CPU if X.device.type == "cpu" else BLOCK
        rows = torch.arange(len(X), device=X.device) % block
        self.blocks = list(zip(self.X.split(block), y.split(block), rows.split(block), strict=True))
        self.W, self.b = X.new_zeros(classes, self.X.shape[1]), X.new_zeros(classes)

    def logits(self, X: Tensor) -> Tensor:
        """Logits (n, classes) of the present fit for X (n, d)."""
        return self.space.scores(self.W.T, self.b, X)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (l2, logits (n, classes) of X_eval (n, d)) for each of `penalties`, with warm starts."""
        for l2 in self.penalties:
            self.fit(l2, self.LOOSE)
            yield l2, self.logits(X_eval)

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """Fit at `l2`, starting from the previous fit; return the logits (n, classes) of X_eval (n, d)."""
        self.fit(l2)
        return self.logits(X_eval)

    def factor(self, a: float, l2: float) -> Tensor:
        """L with LL' = a X'X / n + l2 I: lower triangular (d, d), or its diagonal (r,) in the row space."""
        if self.gram.ndim == 1:
            return (a * self.gram + l2).sqrt().to(self.X)
        # the Gram matrix has float32 rounding errors; the minimum does not depend on L
        jitter = 1e-7 * self.gram.trace()
        hessian = a * self.gram
        hessian.diagonal().add_(l2 + jitter)
        return torch.linalg.cholesky(hessian).to(self.X)

    @torch.no_grad()
    def fit(self, l2: float, tolerance: float = TIGHT, max_passes: int = 2000) -> int:
        """Minimise the objective at `l2` to `tolerance` and return the number of passes over X.

        Warns if `max_passes` is reached. In float32 the solver may stop slightly above `tolerance`, when no
        step decreases the objective any further.
        """
        squares = sum(logits(X, self.W, self.b).softmax(0).square().sum() for X, _, _ in self.blocks)
        a = (1 - float(squares) / len(self.X)) / max(len(self.b) - 1, 1) + 1e-6
        L = self.factor(a, l2)
        V = torch.cat([self.W * L if L.ndim == 1 else self.W @ L, a**0.5 * self.b[:, None]], 1)
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
            W = solve(L, V[:, :-1], upper=False)
            return W.contiguous(), V[:, -1] / a**0.5  # products with column-major W are 2x slower

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
            dW = solve(L, dW, upper=True)
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
