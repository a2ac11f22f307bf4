"""The spectral contrastive loss (HaoChen et al. 2021), a squared surrogate of SimCLR, on any relation G.

Its optimum has a closed form, classical multidimensional scaling. The shortest loss: copy it for a new one.
"""

from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, all_reduce_sharded, world_size
from ssl_runner.loss.base import Loss
from ssl_runner.names import REDUCTIONS
from ssl_runner.relation import Relation


class SpectralContrastive(Loss):
    """|ZZ' - G|_F^2 = repulsion + attraction + constant, computed without an N x N matrix:

        repulsion   |Z'Z|_F^2       push all rows apart, positives included
        attraction  -2 <Z, GZ>      pull positives together
        constant    |G|_F^2         only for `reduction="sum"`

    `reduction="sum"` is the formula above. `reduction="mean"` is |ZZ' - t G|_F^2 / N^2 without its constant
    term, with t = N^2 / sum_ij G_ij. Repulsion is then a mean over all pairs of rows and attraction a mean
    over the positive pairs, so neither the loss nor the scale of Z depends on N or on the number of
    positives. This is the spectral contrastive loss (HaoChen et al. 2021). `center=True` first subtracts the
    mean from every column. Raises ValueError for an unknown `reduction`.
    """

    supports_sharding = capturable = True

    def __init__(self, reduction: str = "mean", center: bool = False) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction}: expected one of {', '.join(REDUCTIONS)}")
        self.weights = {"repulsion": 1.0, "attraction": 1.0} | (
            {"constant": 1.0} if reduction == "sum" else {}
        )
        self.reduction, self.center = reduction, center

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        for _ in range(2 if self.center else 0):  # the second time removes the rounding error of a large mean
            Z = Z - all_reduce_sharded(Z.mean(0)) / world_size()
        ZZ, ZGZ_trace = all_reduce_replicated(Z.T @ Z), all_reduce_replicated((Z * (G @ Z)).sum())
        total = all_reduce_replicated(G.degrees.to(Z).sum())
        square_norm = all_reduce_replicated(G.square_norm.to(Z))
        return self.of_products(ZZ, ZGZ_trace, world_size() * len(Z), total, square_norm)

    def of_products(
        self, ZZ: Tensor, ZGZ_trace: Tensor, N: int, total: Tensor, square_norm: Tensor
    ) -> dict[str, Tensor]:
        """The terms from Z'Z (K, K), tr(Z'GZ), total = sum_ij G_ij and square_norm = sum_ij G_ij^2."""
        if self.reduction == "sum":
            return {"repulsion": ZZ.square().sum(), "attraction": -2 * ZGZ_trace, "constant": square_norm}
        return {"repulsion": ZZ.square().sum() / N**2, "attraction": -2 * ZGZ_trace / total.clamp(min=1)}

    def target_scale(self, N: int, total: Tensor) -> float:
        """The scale t of the target: the loss fits ZZ' to t G. `total` is sum_ij G_ij."""
        return N**2 / max(float(total), 1.0) if self.reduction == "mean" else 1.0
