"""VICReg (Bardes et al. 2022) on any relation G."""

from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import world_size
from ssl_runner.loss.base import Loss
from ssl_runner.loss.kernels import (
    SymmetricProduct,
    column_means,
    first_derivative,
    invariance,
    stripe_square_sum,
)
from ssl_runner.names import VARIANCES
from ssl_runner.relation import Relation


class VICReg(Loss):
    """alpha * variance + beta * covariance + gamma * invariance, with C (K, K) the covariance of Z:

        variance    sum_k max(0, 1 - sqrt(C_kk + eps))    keep the std of each dimension above 1 ("hinge")
                    sum_k (1 - C_kk)^2                    has a closed-form optimum ("squared")
        covariance  sum_{j != k} C_jk^2                   decorrelate dimensions
        invariance  1/N sum_ij G_ij |z_i - z_j|^2         pull positives together

    Terms are sums over k, not means, and C is one covariance over all N rows. The authors' code takes means
    over K and one covariance per view. Its weights 25, 25, 1 for invariance, variance and covariance
    correspond to (alpha, beta, gamma) = (25, 2, 25) / K here, for V = 2 views with equal statistics. The
    weights 25, 25, 1 of solo-learn correspond to 25, 50, 1 in the authors' code. Raises ValueError for an
    unknown `variance`.
    """

    supports_sharding = capturable = True
    min_rows = 2  # a covariance

    def __init__(
        self,
        alpha: float = 25.0,
        beta: float = 1.0,
        gamma: float = 10.0,
        variance: str = "hinge",
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        if variance not in VARIANCES:
            raise ValueError(f"variance={variance}: expected one of {', '.join(VARIANCES)}")
        self.alpha, self.beta, self.gamma, self.variance, self.eps = alpha, beta, gamma, variance, eps
        self.weights = {"variance": alpha, "covariance": beta, "invariance": gamma}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        centred = Z - column_means(Z)  # the gradient through the mean is 0, because centred'1 = 0 and L1 = 0
        variances, covariance = _Covariance.apply(centred)
        # clamp: a constant column has gradient 0, not nan
        std = (variances + self.eps).clamp(min=torch.finfo(Z.dtype).tiny).sqrt()
        variance = (1 - std).relu() if self.variance == "hinge" else (1 - variances).square()
        return {
            "variance": variance.sum(),
            "covariance": covariance,
            "invariance": invariance(centred, G),
        }


class _Covariance(torch.autograd.Function):
    """Centred Z (N, K) -> C_kk (K,) and sum_{j != k} C_jk^2, with C = Z'Z / (N - 1).

    dC is symmetric, so dZ = 2 Z dC / (N - 1).
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor) -> tuple[Tensor, Tensor]:
        C, variances, squares = SymmetricProduct(Z, Z), Z.new_empty(Z.shape[1]), Z.new_zeros(())
        for k, _, stripe in C.stripes():
            stripe /= world_size() * len(Z) - 1
            variances[k] = stripe.diagonal()
            stripe.fill_diagonal_(0)  # before the sum: subtracting it later would lose small entries
            squares += stripe_square_sum(stripe)
        ctx.save_for_backward(Z, C.matrix)
        ctx.size = world_size()
        return variances, squares

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_variances: Tensor, d_squares: Tensor) -> Tensor:
        Z, C = ctx.saved_tensors
        scale = 2 * ctx.size / (ctx.size * len(Z) - 1)
        dC = 2 * scale * d_squares * C
        dC.diagonal().copy_(scale * d_variances)
        return Z @ dC
