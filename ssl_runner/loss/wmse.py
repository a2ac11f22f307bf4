"""W-MSE (Ermolov et al. 2021, arXiv:2007.06346): squared distances of whitened positives, on any relation."""

from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, all_reduce_sharded, world_size
from ssl_runner.loss import kernels
from ssl_runner.loss.base import Loss
from ssl_runner.loss.counter import Counter
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
        self.counter = None if whitening_size is None else Counter()
        self.weights = {"distance": 1.0}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.counter is None:  # checkpoints of earlier versions have a counter always
            state_dict.pop(f"{prefix}counter.state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_rows(self, N: int, K: int, V: int | None) -> None:
        super().check_rows(N, K, V)
        n = N if self.whitening_size is None else N // (V or 1)
        rows = n // self._num_blocks(n)
        if rows <= K:
            raise ValueError(
                f"K={K}: expected less than the {rows} rows that W-MSE whitens at once; use a smaller"
                " projector.K, such as 64, more images or a larger whitening_size"
            )

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        W = whitened(Z) if self.counter is None else self._whitened_blocks(Z, G.V or 1, self.counter)
        if self.unit_rows:
            W = kernels.unit_rows(W)
        total = all_reduce_replicated(G.degrees.to(Z).sum())
        return {"distance": world_size() * len(Z) / total.clamp(min=1) * kernels.invariance(W, G)}

    def _num_blocks(self, n: int) -> int:
        """Number of blocks of n rows."""
        return max(1, n // (self.whitening_size or n))

    def _whitened_blocks(self, Z: Tensor, V: int, counter: Counter) -> Tensor:
        n = len(Z) // V
        order = counter.bits(n).argsort()
        if Z.requires_grad:
            counter.advance()
        rows = [v * n + block for v in range(V) for block in order.tensor_split(self._num_blocks(n))]
        W = torch.cat([whitened(Z[block]) for block in rows])
        return W[torch.cat(rows).argsort()]


def whitened(Z: Tensor) -> Tensor:
    """Z (N, K), N > K -> W (N, K), centred and with covariance I over the rows of all ranks."""
    N = world_size() * len(Z)
    centred = Z - all_reduce_sharded(Z.mean(0)) / world_size()
    C = all_reduce_sharded(centred.T @ centred) / (N - 1)
    L, failed = torch.linalg.cholesky_ex(C)  # without its check, which is a host-device sync
    L = torch.where(failed > 0, torch.nan, L)
    return torch.linalg.solve_triangular(L.T, centred, upper=True, left=False)
