"""LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544): invariance, and embeddings that are Gaussian."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, world_size
from ssl_runner.loss.base import Loss
from ssl_runner.loss.counter import Counter
from ssl_runner.loss.kernels import column_means, first_derivative, invariance
from ssl_runner.relation import Relation

LAST_KNOT, KNOTS = 3.0, 17  # t_j = j dt, j = 0 ... 16; the knot at 0 adds nothing, as both functions are 1
SPACING = LAST_KNOT / (KNOTS - 1)


class SIGReg(Loss):
    """alpha * gaussianity + gamma * invariance:

        gaussianity  mean over unit directions a of the Epps-Pulley statistic of Za against N(0, 1)
        invariance   1/N sum_ij G_ij |z_i - z_j|^2, that of VICReg

    The statistic of x (N,) is N times the integral over [-3, 3] of |1/N sum_i exp(itx_i) - phi(t)|^2 phi(t),
    with phi(t) = exp(-t^2/2), by the trapezoidal rule on the authors' 17 knots in [0, 3]. The `directions`
    are drawn again at each training step, equal on all ranks (`Counter`). Eval mode keeps them.

    `per_view=True` is the authors' form, the mean over the views of the statistic of one view's n rows. It
    needs a relation whose rows are views, G.V. Their loss with trade-off lambda is then (alpha, gamma) =
    (lambda, (1 - lambda) / (2VK)) here, for `relation=views`: the squared distances of the V views from their
    mean add up to sum_ij G_ij |z_i - z_j|^2 / (2V). By default the statistic is that of all N rows, V times
    as large if an image's views have equal embeddings.

    Time is O(N K directions) and memory O(N directions). Ranks exchange 32 sums per direction (and view).
    Raises ValueError for directions < 1.
    """

    supports_sharding = capturable = True

    def __init__(
        self, alpha: float = 1.0, gamma: float = 0.1, directions: int = 256, per_view: bool = False
    ) -> None:
        super().__init__()
        if directions < 1:
            raise ValueError(f"directions={directions}: expected an integer >= 1; the authors use 256")
        self.directions, self.per_view, self.needs_views = directions, per_view, per_view
        self.counter = Counter()
        self.weights = {"gaussianity": alpha, "invariance": gamma}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        with torch.no_grad():
            A = self.counter.normal(Z.shape[1], self.directions).to(Z)
            A /= A.norm(dim=0)
        if Z.requires_grad:
            self.counter.advance()
        X = (Z @ A).unflatten(0, (G.V or 1 if self.per_view else 1, -1))  # (views, n, M)
        return {
            "gaussianity": epps_pulley(X).mean(),
            "invariance": invariance(Z - column_means(Z), G),
        }


def epps_pulley(X: Tensor) -> Tensor:
    """Statistic of each column of X (..., N, M) against N(0, 1), over the rows of all ranks: (..., M)."""
    N = world_size() * X.shape[-2]
    means = all_reduce_replicated(_FourierSums.apply(X)) / N
    t = SPACING * torch.arange(1, KNOTS, dtype=X.dtype, device=X.device)
    phi = (-t.square() / 2).exp()
    weights = 2 * SPACING * phi * (1 - 0.5 * (t == t.amax()).to(t))
    errors = (means[0] - phi[:, None]).square() + means[1].square()  # (..., KNOTS - 1, M), see _FourierSums
    return N * (weights[:, None] * errors).sum(-2)


class _FourierSums(torch.autograd.Function):
    """X (..., N, M) -> sum_i cos(t x_i) and sum_i sin(t x_i) for the knots t > 0: (2, ..., KNOTS - 1, M).

    exp(i t_j x) is the j-th power of exp(i dt x). Backward computes the powers again, to save memory.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        ctx.save_for_backward(X)
        return torch.stack([torch.stack([c.sum(-2), s.sum(-2)]) for c, s in powers(X)], -2)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        d_cos, d_sin = upstream.unsqueeze(-2).unbind(0)  # (..., KNOTS - 1, 1, M)
        dX = torch.zeros_like(X)
        for j, (c, s) in enumerate(powers(X)):
            dX += (j + 1) * SPACING * (d_sin[..., j, :, :] * c - d_cos[..., j, :, :] * s)
        return dX


def powers(X: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cos(t_j X) and sin(t_j X) for j = 1 ... KNOTS - 1."""
    c1, s1 = (SPACING * X).cos(), (SPACING * X).sin()
    c, s = c1, s1
    for j in range(1, KNOTS):
        yield c, s
        if j < KNOTS - 1:
            c, s = c * c1 - s * s1, s * c1 + c * s1
