"""The squared surrogate of SimCLR on any relation G, whose optimum is closed: classical multidimensional scaling."""

import torch
from torch import Tensor

from ssl_runner.loss.base import Loss
from ssl_runner.relation import Relation


class SquaredSimCLR(Loss):
    """|ZZ' - t G|_F^2 / s = repulsion + attraction + constant, which is computed without any N x N matrix:

        repulsion   |Z'Z|_F^2 / s         rows spread, related or not
        attraction  -2 t <Z, GZ> / s      related rows meet
        constant    t^2 |G|_F^2 / s

    `reduction="sum"` is t = s = 1 (Balestriero & LeCun 2022, theory of SimCLR). `"mean"` is t = N^2 / sum_ij G_ij and s = N^2, a
    mean over all pairs of rows: Z's scale then depends neither on N nor on the number of positives (where they are views, this is
    the spectral contrastive loss of HaoChen et al. 2021). `center=True` first takes the mean off every column.
    """

    def __init__(self, reduction: str = "mean", center: bool = False) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction} is not one of: mean, sum")
        self.weights = {"repulsion": 1.0, "attraction": 1.0, "constant": 1.0}
        self.reduction, self.center = reduction, center

    def scales(self, N: int, total: Tensor) -> tuple[Tensor, Tensor]:
        """t and s, scalars, for N rows and total = sum_ij G_ij."""
        one = torch.ones_like(total)
        return (N**2 / total, N**2 * one) if self.reduction == "mean" else (one, one)

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        if self.center:
            Z = Z - Z.mean(0)
        t, s = self.scales(len(Z), G.degrees.to(Z).sum().clamp(min=1))
        return {
            "repulsion": (Z.T @ Z).square().sum() / s,
            "attraction": -2 * t * (Z * (G @ Z)).sum() / s,
            "constant": t**2 * G.square_norm.to(Z) / s,
        }
