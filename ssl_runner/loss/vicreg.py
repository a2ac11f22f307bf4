"""VICReg (Bardes et al. 2022) on any relation G."""

import torch
from torch import Tensor

from ssl_runner.distributed import pooled, size, total
from ssl_runner.loss.base import Loss, off_diagonal
from ssl_runner.relation import Relation


class VICReg(Loss):
    """alpha * variance + beta * covariance + gamma * invariance, with C (K, K) the covariance of the N rows of Z:

        variance    sum_k max(0, 1 - sqrt(C_kk + eps))    every direction is used ("hinge")
                    sum_k (1 - C_kk)^2                    the form whose optimum is closed ("squared")
        covariance  sum_{j != k} C_jk^2                   no two directions say the same
        invariance  1/N sum_ij G_ij |z_i - z_j|^2         related rows meet

    Sums over k, not means, and one covariance over all N rows. The authors' code (means over K, one covariance a view,
    weights 25, 25, 1 for invariance, variance, covariance) is (alpha, beta, gamma) = (25, 2, 25) / K here at V = 2, where the
    two views' statistics are equal; solo-learn's 25/25/1 is the authors' 25/50/1.
    """

    reduces = True

    def __init__(
        self, alpha: float = 25.0, beta: float = 1.0, gamma: float = 25.0, variance: str = "hinge", eps: float = 1e-4
    ) -> None:
        super().__init__()
        if variance not in ("hinge", "squared"):
            raise ValueError(f"variance={variance} is not one of: hinge, squared")
        self.weights = {"variance": alpha, "covariance": beta, "invariance": gamma}
        self.variance, self.eps = variance, eps

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        N, d = size() * len(Z), G.degrees.to(Z)[:, None]
        centred = Z - pooled(Z.mean(0)) / size()
        C = total(centred.T @ centred) / (N - 1)
        std = (C.diagonal() + self.eps).clamp(min=torch.finfo(Z.dtype).tiny).sqrt()  # a dead column has gradient 0, not nan
        variance = (1 - std).relu() if self.variance == "hinge" else (1 - C.diagonal()).square()
        return {
            "variance": variance.sum(),
            "covariance": off_diagonal(C).square().sum(),
            "invariance": 2 / N * total(((d * centred - G @ centred) * centred).sum()),  # 2/N tr(Z'LZ), and L1 = 0
        }
