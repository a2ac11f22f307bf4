"""Principal axes of n rows with more than n features, from their n x n Gram matrix."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**23  # of a block of columns or rows in float64, 64 MB


class RowSpace:
    """Orthonormal basis of the row space of the standardised rows S = (X - mean) * scale, X (n, D), n < D.

    The minimiser of a loss of S w plus l2 / 2 |w|^2 lies in the row space of S, so a probe needs r <= n
    coordinates instead of D. With the eigenvectors U (n, r) of S S' and its r positive eigenvalues,

        basis Q = S' U / sqrt(values)  (D, r)        coordinates S Q = U sqrt(values)  (n, r)

    Only n x n matrices and blocks of S are stored. Q is applied through X, which is kept without a copy.
    The matrices are in float64 on the device of X, or on the CPU for MPS, which has no float64.
    """

    def __init__(self, X: Tensor, mean: Tensor, scale: Tensor):
        """X (n, D); mean and scale (D,) in float64, as returned by `moments`."""
        self.X, self.mean, self.scale = X, mean, scale
        gram = mean.new_zeros(len(X), len(X))
        for S in self.blocks():
            gram.addmm_(S, S.T)
        values, U = torch.linalg.eigh(gram)
        limits = torch.finfo(values.dtype)
        rank = max(1, int((values > values[-1] * len(X) * limits.eps).sum()))
        self.values, self.U = values.flip(0)[:rank].clamp(min=limits.tiny), U.flip(1)[:, :rank]

    def blocks(self) -> Iterator[Tensor]:
        """Yield S (n, D) in blocks of columns, in float64."""
        start = 0
        for X in column_blocks(self.X):
            part = slice(start, start := start + X.shape[1])
            yield (float64(X) - self.mean[part]).mul_(self.scale[part])

    def coordinates(self) -> Tensor:
        """The rows of S in the basis: (n, r) in float64, with descending variance."""
        return self.U * self.values.sqrt()

    def to_features(self, W: Tensor) -> Tensor:
        """Map weights W (r, k) of the coordinates to weights Q W (D, k) of the columns of S, in float64."""
        A = self.U @ (float64(W).to(self.values.device) / self.values.sqrt()[:, None])
        return torch.cat([S.T @ A for S in self.blocks()])

    @property
    def gram(self) -> Tensor:
        """The Gram matrix of the coordinates divided by n, which is diagonal: (r,)."""
        return self.values / len(self.X)

    def weights(self, W: Tensor) -> Tensor:
        """Map weights W (r, k) of the coordinates to weights (D, k) of X - mean, in float64."""
        return self.scale[:, None] * self.to_features(W)

    def scores(self, W: Tensor, b: Tensor, X: Tensor) -> Tensor:
        """Coordinates of other rows X (m, D) times W (r, k), plus b (k,): (m, k) as X."""
        W = self.weights(W)
        blocks = X.split(max(1, BLOCK_ELEMENTS // X.shape[1]))
        return torch.cat([(float64(rows) - self.mean) @ W for rows in blocks]).to(X) + b


def column_blocks(X: Tensor) -> Sequence[Tensor]:
    """Views of X (n, D) of at most BLOCK_ELEMENTS elements, and at least one column."""
    return X.split(max(1, BLOCK_ELEMENTS // len(X)), 1)


def float64(X: Tensor) -> Tensor:
    """A float64 copy of float32 X, on its device, or on the CPU for MPS, which has no float64."""
    return X.cpu().double() if X.device.type == "mps" else X.double()


def moments(X: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation (D,) of the columns of X (n, D), in float64.

    `correction` is that of `torch.std`. The reciprocal of a constant column is 0.
    """
    means, squares = [], []
    for part in map(float64, column_blocks(X)):
        means.append(part.mean(0))
        squares.append((part - means[-1]).square_().sum(0))
    mean, std = torch.cat(means), (torch.cat(squares) / (len(X) - correction)).sqrt()
    return mean, torch.where(std > 1e-6 * std.max(), 1 / std, 0)
