"""Ridge-regression probe: closed form, one eigendecomposition for all L2 penalties."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.probe.protocol import Probe
from ssl_runner.probe.row_space import RowSpace, float64, moments

PENALTIES = tuple(10.0 ** (1 - exponent / 2) for exponent in range(15))  # 10 .. 1e-6, strongest first


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
        self.rows: RowSpace | None = None
        self.b = torch.bincount(y, minlength=classes) / len(X)
        if len(X) < X.shape[1]:
            self.in_row_space(X, F.one_hot(y, classes))
        else:
            self.from_moments(X, y, classes, block)

    def in_row_space(self, X: Tensor, Y: Tensor) -> None:
        """Decompose the covariance of the coordinates of X (n, d), which is diagonal. Y (n, classes)."""
        self.rows = RowSpace(X, *moments(X, correction=0))
        self.values = self.rows.values / len(X)
        Y = float64(Y)
        self.C = self.rows.coordinates().T @ (Y - Y.mean(0)) / len(X)

    def from_moments(self, X: Tensor, y: Tensor, classes: int, block: int) -> None:
        """Decompose X'X / n, (d, d)."""
        dtype = torch.float32 if X.device.type == "mps" else torch.float64
        n, d = X.shape
        shift = X[:block].to(dtype).mean(0)  # close to the mean: avoids cancellation in the products
        XX, YX = shift.new_zeros(d, d), shift.new_zeros(classes, d)
        for rows, labels in zip(X.split(block), y.split(block), strict=True):
            rows = rows.to(dtype) - shift
            XX.addmm_(rows.T, rows)
            YX.addmm_(F.one_hot(labels, classes).to(dtype).T, rows)
        mean = YX.sum(0) / n
        self.mean = mean + shift
        XX, YX = XX / n - torch.outer(mean, mean), YX / n - torch.outer(self.b.to(mean), mean)
        std = XX.diagonal().clamp(min=0).sqrt()
        scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        values, Q = torch.linalg.eigh(float64(scale[:, None] * XX * scale))
        # Q maps features to principal components
        self.values, self.Q = values.clamp(min=0).to(mean), scale[:, None] * Q.to(mean)
        self.C = self.Q.T @ YX.T  # (d, classes)

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (l2, predictions (n, classes) for X_eval (n, d)) for each of `penalties`."""
        if self.rows is None:
            X_eval = X_eval - self.mean.to(X_eval)
        for l2 in self.penalties:
            yield l2, self.predictions(l2, X_eval)

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """Return the predictions (n, classes) for X_eval (n, d) of the fit at `l2`."""
        if self.rows is None:
            X_eval = X_eval - self.mean.to(X_eval)
        return self.predictions(l2, X_eval)

    def predictions(self, l2: float, X_eval: Tensor) -> Tensor:
        """Predictions (n, classes) at `l2` for X_eval (n, d), centred unless the fit is in the row space."""
        if self.rows is not None:
            return self.rows.scores(self.C / (self.values + l2)[:, None], X_eval) + self.b
        return X_eval @ self.fit(l2).to(X_eval) + self.b

    def fit(self, l2: float) -> Tensor:
        """Return W (d, classes) at `l2`, for features that are centred but not scaled."""
        W = self.C / (self.values + l2)[:, None]
        return self.Q @ W if self.rows is None else self.rows.scale[:, None] * self.rows.to_features(W)
