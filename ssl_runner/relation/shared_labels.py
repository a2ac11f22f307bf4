"""The relation of rows that have several labels each, weighted by the number of labels they share."""

import torch
from torch import Tensor

from ssl_runner.distributed import all_reduce_sharded, all_reduce_sum
from ssl_runner.relation.operators import Relation, to_float64


class SharedLabels(Relation):
    """G_ij is the number of labels that rows i != j share: G = YY' - diag(c), with c_i the labels of row i.

    Y (N, C) of 0 and 1. `G @ Z` is Y (Y'Z) - c Z, in O(N C K). With one label per row it is `Labels`. The
    normalized relation is D^-1/2 G D^-1/2; rows without positives stay zero.

    In distributed training Y holds the labels of this rank's rows, as for `Labels`: sums over the rows are
    all-reduced, and `edges` and `dense` cover the rows of this rank only.

    Raises ValueError if Y is empty or not a matrix.
    """

    weighted = True

    def __init__(self, Y: Tensor, normalized: bool = False):
        if Y.ndim != 2 or Y.numel() == 0:
            raise ValueError(
                f"Y.shape={tuple(Y.shape)}: expected (N, C); give one row of labels per row of Z"
            )
        self.Y, self.num_rows = Y.float(), len(Y)
        self.counts = self.Y.sum(1)
        self.degrees = self.Y @ all_reduce_sum(self.Y.sum(0)) - self.counts
        self.scale = torch.ones_like(to_float64(self.degrees))
        if normalized:
            degrees = to_float64(self.degrees)
            self.scale = (degrees > 0) * degrees.clamp(min=1).rsqrt()
            self.degrees = self._product(torch.ones_like(degrees)[:, None])[:, 0]

    def _product(self, Z: Tensor) -> Tensor:
        scale, counts, Y = (
            self.scale[:, None].to(Z.dtype),
            self.counts[:, None].to(Z.dtype),
            self.Y.to(Z.dtype),
        )
        Z = scale * Z
        return scale * (Y @ all_reduce_sharded(Y.T @ Z) - counts * Z)

    def edges(self) -> Tensor:
        return (self.Y @ self.Y.T).fill_diagonal_(0).nonzero().T

    def weights(self) -> Tensor:
        i, j = self.edges()
        return (self.scale[i] * self.scale[j] * (self.Y[i] * self.Y[j]).sum(1)).cpu().double()

    @property
    def square_norm(self) -> Tensor:
        """sum_i a_i (y_i' M y_i - a_i c_i^2) with M = sum_j a_j y_j y_j' (C, C) and a = scale^2: O(N C^2)."""
        Y, a, counts = to_float64(self.Y), self.scale.square(), to_float64(self.counts)
        M = all_reduce_sum(Y.T @ (a[:, None] * Y))
        return a @ ((Y @ M * Y).sum(1) - a * counts.square())
