"""W-MSE (Ermolov et al. 2021, arXiv:2007.06346): squared distances of whitened positives, on any relation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, all_reduce_sharded, world_size
from ssl_runner.loss.base import Loss
from ssl_runner.loss.counter import Counter
from ssl_runner.loss.kernels import invariance
from ssl_runner.relation import Relation


class WMSE(Loss):
    """Mean over the positive pairs of |w_i - w_j|^2, for W = (Z - mean) L^-T, LL' = C, the covariance of Z:

        distance  sum_ij G_ij |w_i - w_j|^2 / sum_ij G_ij

    The columns of W have the covariance I. `unit_rows=True` normalises the rows of W first, as the authors
    do by default; the loss is then theirs. Their loss without it is a mean over the K columns as well:
    1/K of the one here.

    `whitening_size` whitens at random blocks of that many rows (up to twice as many if N is not a multiple),
    drawn again at each training step (`Counter`). If the rows are views, G.V, the blocks are of one view
    each, with the same images in each view, as the authors'. Their loss without sub-batches is
    `whitening_size` = n. By default all N rows are whitened at once.

    There is no regularisation of C: with it, Z -> 0 would be an optimum. A singular C gives nan. Ranks
    exchange K^2 + K sums forward and as many backward; with blocks, training gathers all rows instead. Raises
    ValueError for a block of K rows or fewer, whose C is singular, and for whitening_size < 2.
    """

    min_rows = 2
    supports_sharding = True  # capturable stays False: a factorisation has not been tried in a CUDA graph

    def __init__(self, unit_rows: bool = True, whitening_size: int | None = None) -> None:
        super().__init__()
        if whitening_size is not None and whitening_size < 2:
            raise ValueError(
                f"whitening_size={whitening_size}: expected an integer >= 2, or none; use more than K rows"
            )
        self.unit_rows, self.whitening_size = unit_rows, whitening_size
        self.supports_sharding = whitening_size is None
        self.counter = Counter()
        self.weights = {"distance": 1.0}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        W = whitened(Z) if self.whitening_size is None else self._whitened_blocks(Z, G.V or 1)
        if self.unit_rows:
            W = F.normalize(W)
        total = all_reduce_replicated(G.degrees.to(Z).sum())
        return {"distance": world_size() * len(Z) / total.clamp(min=1) * invariance(W, G)}

    def _whitened_blocks(self, Z: Tensor, V: int) -> Tensor:
        n, size = len(Z) // V, self.whitening_size
        assert size is not None
        order = self.counter.bits(n).argsort()
        if Z.requires_grad:
            self.counter.advance()
        rows = [v * n + block for v in range(V) for block in order.tensor_split(max(1, n // size))]
        W = torch.cat([whitened(Z[block]) for block in rows])
        return W[torch.cat(rows).argsort()]


def whitened(Z: Tensor) -> Tensor:
    """Z (N, K) -> W (N, K), centred and with covariance I over the rows of all ranks.

    Raises ValueError for N <= K.
    """
    N, K = world_size() * len(Z), Z.shape[1]
    if N <= K:
        raise ValueError(
            f"{N} rows of K={K} columns to whiten: expected more rows than columns; reduce projector.K,"
            " or increase batch_size or whitening_size"
        )
    centred = Z - all_reduce_sharded(Z.mean(0)) / world_size()
    C = all_reduce_sharded(centred.T @ centred) / (N - 1)
    L, failed = torch.linalg.cholesky_ex(C)  # without its check, which is a host-device sync
    L = torch.where(failed > 0, torch.nan, L)
    return torch.linalg.solve_triangular(L.T, centred, upper=True, left=False)
