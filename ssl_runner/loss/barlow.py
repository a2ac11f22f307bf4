"""Barlow Twins (Zbontar et al. 2021) on any relation G."""

import torch
from torch import Tensor

from ssl_runner.distributed import pooled, total
from ssl_runner.loss.base import Loss, off_diagonal
from ssl_runner.relation import Relation


class BarlowTwins(Loss):
    """diagonal + alpha * off_diagonal of the cross-correlation C (K, K) of the columns of Z over all ordered positive pairs:

        C_kl = (Z'GZ)_kl / (n_k n_l + eps),  n_k = sqrt(sum_i d_i z_ik^2)
        diagonal      sum_k (C_kk - 1)^2       related rows agree in every direction
        off_diagonal  sum_{k != l} C_kl^2      no two directions say the same

    `center=True` first takes the degree-weighted mean off every column: at V = 2 C is then the mean of the authors'
    batch-normalised cross-correlation and its transpose, where the two views' statistics are equal.
    """

    reduces = True

    def __init__(self, alpha: float = 5e-3, center: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weights = {"diagonal": 1.0, "off_diagonal": alpha}
        self.center, self.eps = center, eps

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        d = G.degrees.to(Z)[:, None]
        if self.center:
            Z = Z - pooled((d * Z).sum(0)) / total(d.sum()).clamp(min=1)
        n = total((d * Z.square()).sum(0)).clamp(min=torch.finfo(Z.dtype).tiny).sqrt()  # a dead column has gradient 0, not nan
        return self.of_correlations(total(Z.T @ (G @ Z)) / (n[:, None] * n + self.eps))

    def of_correlations(self, C: Tensor) -> dict[str, Tensor]:
        """The terms from C (K, K)."""
        return {"diagonal": (C.diagonal() - 1).square().sum(), "off_diagonal": off_diagonal(C).square().sum()}
