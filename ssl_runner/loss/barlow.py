"""Barlow Twins (Zbontar et al. 2021) on any relation G."""

from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import all_reduce_sum, world_size
from ssl_runner.loss.base import Loss, off_diagonal
from ssl_runner.loss.kernels import SymmetricProduct, first_derivative, stripe_square_sum
from ssl_runner.relation import Relation


class BarlowTwins(Loss):
    """diagonal + alpha * off_diagonal, with C (K, K) the cross-correlation over all ordered positive pairs:

        C_kl = (Z'GZ)_kl / (n_k n_l + eps),  n_k = sqrt(sum_i d_i z_ik^2)
        diagonal      sum_k (C_kk - 1)^2       make positives agree in every dimension
        off_diagonal  sum_{k != l} C_kl^2      decorrelate dimensions

    `center=True` first subtracts the degree-weighted mean from every column. For V = 2 views with equal
    statistics, C is then the mean of the authors' batch-normalised cross-correlation and its transpose.
    """

    supports_sharding = capturable = True

    def __init__(self, alpha: float = 0.02, center: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.alpha, self.center, self.eps = alpha, center, eps
        self.weights = {"diagonal": 1.0, "off_diagonal": alpha}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        if self.center:
            d = G.degrees.to(Z)
            total = all_reduce_sum(d.sum()).clamp(min=1)
            for _ in range(2):  # the second time removes the rounding error of a large mean
                with torch.no_grad():  # the gradient through the mean is 0, because d'Z = 0 after centring
                    mean = all_reduce_sum(d @ Z) / total
                Z = Z - mean
        diagonal, squares = _Correlation.apply(Z, G, self.eps)
        return {"diagonal": (diagonal - 1).square().sum(), "off_diagonal": squares}

    def of_correlations(self, C: Tensor) -> dict[str, Tensor]:
        """Compute the terms from the cross-correlation C (K, K)."""
        return {"diagonal": (C.diagonal() - 1).square().sum(), "off_diagonal": off_diagonal(C).square().sum()}


class _Correlation(torch.autograd.Function):
    """Z (N, K) -> C_kk (K,) and sum_{k != l} C_kl^2, with C_kl = M_kl / (n_k n_l + eps) and M = Z'GZ.

    n_k^2 = sum_i d_i z_ik^2. M and dM are symmetric, so dZ = 2 GZ dM + 2 diag(d) Z diag(dn / 2n).
    Contributions, with D_kl = C_kl / (n_k n_l + eps):

        C_kk                   dM_kk = 1 / (n_k^2 + eps),  dn_k = -2 C_kk n_k / (n_k^2 + eps)
        sum_{k != l} C_kl^2    dM_kl = 2 D_kl,             dn_k = -4 sum_{l != k} C_kl D_kl n_l
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, G: Relation, eps: float) -> tuple[Tensor, Tensor]:
        d, GZ = G.degrees.to(Z), G @ Z
        n = all_reduce_sum(d @ Z.square()).clamp(min=torch.finfo(Z.dtype).tiny).sqrt()
        M, diagonal, squares = SymmetricProduct(Z, GZ, G), torch.empty_like(n), Z.new_zeros(())
        CDn = torch.zeros_like(n)  # sum_{l != k} C_kl D_kl n_l
        for k, m, stripe in M.stripes():
            nn = torch.outer(n[k], n[m]).add_(eps)
            C = stripe / nn
            diagonal[k] = C.diagonal()
            C.fill_diagonal_(0)
            squares += stripe_square_sum(C)
            D = torch.div(C, nn, out=stripe)
            C *= D
            CDn[k] += C @ n[m]
            CDn[k.stop :] += n[k] @ C[:, len(C) :]
        ctx.save_for_backward(Z, d, GZ, n, M.matrix, diagonal, CDn)
        ctx.size, ctx.eps = world_size(), eps
        return diagonal, squares

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_diagonal: Tensor, d_squares: Tensor) -> tuple[Tensor, None, None]:
        Z, d, GZ, n, D, diagonal, CDn = ctx.saved_tensors
        d_diagonal = d_diagonal / (n.square() + ctx.eps)
        dM = 4 * ctx.size * d_squares * D
        dM.diagonal().copy_(2 * ctx.size * d_diagonal)
        dn = -4 * d_squares * CDn - 2 * d_diagonal * diagonal * n
        nonzero = n.square() > torch.finfo(n.dtype).tiny  # a zero column has gradient 0, not nan
        return (Z * torch.where(nonzero, ctx.size * dn / n, 0)).mul_(d[:, None]).addmm_(GZ, dM), None, None
