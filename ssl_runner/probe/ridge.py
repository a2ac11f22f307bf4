"""Ridge-regression probe: closed form, one eigendecomposition for all L2 penalties."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.probe.protocol import Probe

PENALTIES = tuple(10.0 ** (1 - exponent / 2) for exponent in range(15))  # 10 .. 1e-6, strongest first


class RidgeProbe(Probe):
    """Ridge regression of one-hot labels Y (n, classes) on standardised features X (n, d).

    The minimum over W (d, classes) and b (classes,) of

        1 / 2n |X W + 1 b' - Y|^2 + l2 / 2 |W|^2

    With X centred, it is W = (X'X / n + l2 I)^-1 X'Y / n and b = mean of Y.

    One eigendecomposition of X'X / n serves every l2 of `penalties`, the values to select from. The moments
    are accumulated in float64 (float32 on MPS) over blocks of `block` rows.
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
        """Yield (l2, predictions (n, classes) for X_eval (n, d)) for each of `penalties`."""
        X_eval = X_eval - self.mean.to(X_eval)
        for l2 in self.penalties:
            yield l2, X_eval @ self.fit(l2).to(X_eval) + self.b

    def scores(self, l2: float, X_eval: Tensor) -> Tensor:
        """Return the predictions (n, classes) for X_eval (n, d) of the fit at `l2`."""
        return (X_eval - self.mean.to(X_eval)) @ self.fit(l2).to(X_eval) + self.b

    def fit(self, l2: float) -> Tensor:
        """Return W (d, classes) at `l2`, for features that are centred but not scaled."""
        return self.Q @ (self.C / (self.values + l2)[:, None])
