"""Ridge-regression probe: closed form, one eigendecomposition for all L2 penalties."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.probe.protocol import Probe
from ssl_runner.probe.row_space import RowSpace, float64, moments

PENALTIES = tuple(10.0 ** (1 - exponent / 2) for exponent in range(15))  # 10 .. 1e-6, strongest first


@dataclass
class PrincipalAxes:
    """Principal axes of standardised rows of d features, with the interface of `RowSpace`.

    mean (d,) of the features; gram (d,), the variance along each axis; Q (d, d), which maps centred features
    to coordinates along the axes.
    """

    mean: Tensor
    gram: Tensor
    Q: Tensor

    def weights(self, W: Tensor) -> Tensor:
        """Map weights W (d, k) of the coordinates to weights (d, k) of the centred features."""
        return self.Q @ W

    def scores(self, W: Tensor, b: Tensor, X: Tensor) -> Tensor:
        """Coordinates of rows X (m, d) times W (d, k), plus b (k,): (m, k) as X."""
        return (X - self.mean.to(X)) @ self.weights(W).to(X) + b


def from_moments(X: Tensor, y: Tensor, b: Tensor, block: int) -> tuple[PrincipalAxes, Tensor]:
    """Principal axes of X (n, d), and the covariance (d, classes) of their coordinates with one-hot labels.

    y (n,) labels, b (classes,) their frequencies. X'X is accumulated over blocks of `block` rows.
    """
    dtype = torch.float32 if X.device.type == "mps" else torch.float64
    (n, d), classes = X.shape, len(b)
    shift = X[:block].to(dtype).mean(0)  # close to the mean: avoids cancellation in the products
    XX, YX = shift.new_zeros(d, d), shift.new_zeros(classes, d)
    for rows, labels in zip(X.split(block), y.split(block), strict=True):
        rows = rows.to(dtype) - shift
        XX.addmm_(rows.T, rows)
        YX.addmm_(F.one_hot(labels, classes).to(dtype).T, rows)
    mean = YX.sum(0) / n
    XX, YX = XX / n - torch.outer(mean, mean), YX / n - torch.outer(b.to(mean), mean)
    std = XX.diagonal().clamp(min=0).sqrt()
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
    values, Q = torch.linalg.eigh(float64(scale[:, None] * XX * scale))
    Q = scale[:, None] * Q.to(mean)
    return PrincipalAxes(mean + shift, values.clamp(min=0).to(mean), Q), Q.T @ YX.T


class RidgeProbe(Probe):
    """Ridge regression of one-hot labels Y (n, classes) on standardised features X (n, d).

    The minimum over W (d, classes) and b (classes,) of

        1 / 2n |X W + 1 b' - Y|^2 + l2 / 2 |W|^2

    With X centred, it is W = (X'X / n + l2 I)^-1 X'Y / n and b = mean of Y.

    One eigendecomposition of X'X / n serves every l2 of `penalties`, the values to select from. The moments
    are accumulated in float64 (float32 on MPS) over blocks of `block` rows. With n < d the same is done in
    the row space of X (`RowSpace`), without a d x d matrix.
    """

    hyperparameter = "l2"

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        classes: int,
        penalties: Sequence[float] = PENALTIES,
        block: int = 4096,
    ):
        self.penalties = penalties
        self.b = torch.bincount(y, minlength=classes).to(X) / len(X)
        if len(X) < X.shape[1]:
            self.axes: RowSpace | PrincipalAxes = RowSpace(X, *moments(X, correction=0))
            Y = float64(F.one_hot(y, classes))
            self.C = self.axes.coordinates().T @ (Y - Y.mean(0)) / len(X)  # (r, classes)
        else:
            self.axes, self.C = from_moments(X, y, self.b, block)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (l2, predictions (n, classes) for X_eval (n, d)) for each of `penalties`."""
        for l2 in self.penalties:
            yield l2, self.scores(l2, X_eval)

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """Return the predictions (n, classes) for X_eval (n, d) of the fit at `l2`."""
        return self.axes.scores(self.solution(l2), self.b, X_eval)

    def fit(self, l2: float) -> Tensor:
        """Return W (d, classes) at `l2`, for features that are centred but not scaled."""
        return self.axes.weights(self.solution(l2))

    def solution(self, l2: float) -> Tensor:
        """Weights (r, classes) of the coordinates along the axes at `l2`."""
        return self.C / (self.axes.gram + l2)[:, None]
