"""FroSSL (Skean et al. 2024) on any relation G."""

import torch
from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, world_size
from ssl_runner.loss.base import Loss
from ssl_runner.loss.kernels import invariance, unit_rows
from ssl_runner.relation import Relation


class FroSSL(Loss):
    """entropy + gamma * invariance, with unit rows u_i = z_i / |z_i|:

        entropy     log |U'U/N|_F^2                  spread the rows: the spectrum of U'U/N becomes flat
        invariance  1/N sum_ij G_ij |u_i - u_j|^2    pull positives together

    U'U/N has trace 1, so the first term is minus its matrix-based Renyi entropy of order 2, from
    -log min(N, K) to 0 (arXiv:2310.02903). The statistic is over all rows. `per_view=True` takes the mean
    over the V views of log |U_v'U_v/n|_F^2 instead, as the authors do, and needs a relation with
    `Relation.V`. For Views, V times the loss is then the authors' multi-view loss with the invariance weight
    2 V gamma: their weight 1 is gamma = 0.25 at V = 2. Over all rows the entropy also grows if positives are
    separated: at V = 2 and K >= N the optimum does so for gamma < 0.5.

    In distributed training the K x K matrix of each statistic is all-reduced.
    """

    supports_sharding = capturable = True

    def __init__(self, gamma: float = 1.0, per_view: bool = False) -> None:
        super().__init__()
        self.gamma, self.per_view, self.needs_views = gamma, per_view, per_view
        self.weights = {"entropy": 1.0, "invariance": gamma}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        U, W = unit_rows(Z), world_size()
        blocks = U.unflatten(0, (G.V or 1 if self.per_view else 1, -1))  # (V, n, K), or (1, N, K)
        C = all_reduce_replicated(blocks.mT @ blocks) / (W * blocks.shape[1])
        squares = C.square().sum((1, 2)).clamp(min=torch.finfo(C.dtype).tiny)  # 0 only for Z = 0
        return {"entropy": squares.log().mean(), "invariance": invariance(U, G)}
