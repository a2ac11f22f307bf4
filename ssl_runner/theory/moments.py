"""Second moments of features and a relation, accumulated over batches: the N x D features are not kept."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.relation import Relation, Views
from ssl_runner.theory.matrices import HOST, helmert


class Moments:
    """Sums over the rows x of X (N, D) and a relation over them, on X's device.

    float64, or float32 on MPS, which does not support float64. Add a batch with its own relation (`add`:
    positive pairs lie within the batch), or by its labels (`add_classes`: they span all batches).

    class_sizes (C,): rows of each class in all batches together, for `add_classes`. normalized: divide G by
    the number of positives, n_c - 1.
    """

    def __init__(
        self, D: int, device: torch.device, class_sizes: Tensor | None = None, normalized: bool = False
    ):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.N = 0
        self.shift: Tensor | None = None  # near the mean, so that the products do not cancel later
        self.X, self.XD = (torch.zeros(D, dtype=dtype, device=device) for _ in range(2))
        self.XX, self.XGX, self.XDX = (torch.zeros(D, D, dtype=dtype, device=device) for _ in range(3))
        self.total = torch.zeros((), dtype=dtype, device=device)  # sum_ij G_ij
        self.square_norm = torch.zeros_like(self.total)  # sum_ij G_ij^2
        self.sums: Tensor | None = None  # of the rows of each class (C, D)
        if class_sizes is not None:
            positives = (class_sizes - 1).clamp(min=0).to(self.X)
            self.degrees = positives.clamp(max=1) if normalized else positives
            self.weights = 1 / positives.clamp(min=1) if normalized else torch.ones_like(positives)
            self.sums = torch.zeros(len(class_sizes), D, dtype=dtype, device=device)

    def add(self, X: Tensor, G: Relation) -> None:
        """Add X (n, D) with a relation over these rows."""
        X = self._shifted(X)
        d = G.degrees.to(X)
        if type(G) is Views:  # eigenvalue V - 1 on the mean of the views, -1 on their contrasts
            ones = torch.ones(G.V, **HOST)
            contrasts = torch.cat([ones[:, None] / G.V**0.5, helmert(ones, G.V - 1)], 1).to(X)
            Y = torch.einsum("vw,vnd->wnd", contrasts, X.view(G.V, G.n, -1))
            mean, rest = Y[0].T @ Y[0], Y[1:].flatten(0, 1).T @ Y[1:].flatten(0, 1)
            XX = mean + rest
            self.XX += XX
            self.XGX += G.weight * ((G.V - 1) * mean - rest)
            self.XDX += G.weight * (G.V - 1) * XX
        else:
            self.XX += X.T @ X
            self.XGX += X.T @ (G @ X)
            self.XDX += X.T @ (d[:, None] * X)
        self.XD += d @ X
        self.total += d.sum()
        self.square_norm += G.square_norm

    def add_classes(self, X: Tensor, y: Tensor) -> None:
        """Add X (n, D) with labels y (n,): rows of one class, in any batch, are positives."""
        if self.sums is None:
            raise ValueError("Moments without class_sizes: expected the size of each class; pass class_sizes")
        X = self._shifted(X)
        d, w = self.degrees[y], self.weights[y]
        self.XX += X.T @ X
        self.XGX -= X.T @ (w[:, None] * X)
        self.XDX += X.T @ (d[:, None] * X)
        self.sums.index_add_(0, y, X)
        self.XD += d @ X
        self.total += d.sum()
        self.square_norm += (d * w).sum()

    def _shifted(self, X: Tensor) -> Tensor:
        """Count and sum the rows of X, and return X - shift."""
        X = X.detach().to(self.X.dtype)
        if self.shift is None:
            self.shift = X.mean(0)
        X = X - self.shift
        self.N += len(X)
        self.X += X.sum(0)
        return X

    def centred(self) -> "CentredMoments":
        """The moments of X - mean, on the CPU in float64. Raises ValueError without rows."""
        if self.shift is None:
            raise ValueError("Moments of 0 rows: expected at least one batch; add one first")
        XGX = self.XGX if self.sums is None else self.XGX + self.sums.T @ (self.weights[:, None] * self.sums)
        mean = self.X / self.N
        cross = torch.outer(self.XD, mean)
        shifted = self.total * torch.outer(mean, mean) - cross - cross.T
        XX = self.XX - self.N * torch.outer(mean, mean)
        XHX, XGX, XDX, XD, mean = (
            M.cpu().double()
            for M in (XX, XGX + shifted, self.XDX + shifted, self.XD - self.total * mean, mean + self.shift)
        )
        return CentredMoments(self.N, mean, XHX, XGX, XDX, XD, float(self.total), float(self.square_norm))


@dataclass
class CentredMoments:
    """Moments of X (N, D) about its mean (D,): XHX, XGX, XDX (D, D), with X centred and D = diag(d).

    XD (D,) = sum_i d_i x_i. total = sum_ij G_ij. square_norm = sum_ij G_ij^2.
    """

    N: int
    mean: Tensor
    XHX: Tensor
    XGX: Tensor
    XDX: Tensor
    XD: Tensor
    total: float
    square_norm: float

    def transform(self, W: Tensor, mean: Tensor | None = None) -> "CentredMoments":
        """The moments of Z = (X - mean of X) W + mean, with W (D, K) and mean (K,), 0 by default."""
        mean = W.new_zeros(W.shape[1]) if mean is None else mean
        ZHZ, ZGZ, ZDZ = (W.T @ M @ W for M in (self.XHX, self.XGX, self.XDX))
        return replace(self, mean=mean, XHX=ZHZ, XGX=ZGZ, XDX=ZDZ, XD=W.T @ self.XD)

    def about_zero(self) -> "CentredMoments":
        """The same sums without subtracting the mean."""
        cross = torch.outer(self.XD, self.mean)
        square = torch.outer(self.mean, self.mean)
        shifted = self.total * square + cross + cross.T
        XD = self.XD + self.total * self.mean
        return replace(
            self, XHX=self.XHX + self.N * square, XGX=self.XGX + shifted, XDX=self.XDX + shifted, XD=XD
        )

    def about_weighted_mean(self) -> "CentredMoments":
        """The same sums about the degree-weighted mean, sum_i d_i x_i / total."""
        shifted = torch.outer(self.XD, self.XD) / (self.total or 1.0)
        return replace(self, XGX=self.XGX - shifted, XDX=self.XDX - shifted, XD=torch.zeros_like(self.XD))

    def with_constant(self) -> "CentredMoments":
        """The moments of [X, 1]: a constant column, not centred, whose weight is a bias."""
        edge = self.XD[:, None]

        def bordered(M: Tensor, side: Tensor, corner: float) -> Tensor:
            bottom = torch.cat([side.T, M.new_full((1, 1), corner)], 1)
            return torch.cat([torch.cat([M, side], 1), bottom])

        return replace(
            self,
            mean=F.pad(self.mean, (0, 1)),
            XHX=bordered(self.XHX, torch.zeros_like(edge), self.N),
            XGX=bordered(self.XGX, edge, self.total),
            XDX=bordered(self.XDX, edge, self.total),
            XD=F.pad(self.XD, (0, 1), value=self.total),
        )
