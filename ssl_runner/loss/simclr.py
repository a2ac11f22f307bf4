"""SimCLR (Chen et al. 2020) on any relation G, in O(N * block) memory."""

import math
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import (
    all_gather,
    all_reduce_replicated,
    all_reduce_sum,
    rank,
    reduce_scatter,
    world_size,
)
from ssl_runner.loss.base import Loss
from ssl_runner.loss.kernels import column_products, first_derivative, unit_rows
from ssl_runner.names import DENOMINATORS, REDUCTIONS
from ssl_runner.relation import Relation

# Memory is that of float32. A CPU tile fits into the cache; elsewhere large tiles need fewer kernel launches.
BLOCK_ELEMENTS = 2**22  # similarities held at a time: 16 MiB
SIDE = 512  # rows and columns of a tile: 1 MiB
KEPT_ELEMENTS = 2**23  # similarities kept from the first pass for the second: 32 MiB
BLOCK_ELEMENTS_ELSEWHERE = 2**24  # 64 MiB, also the largest tile: 4,096 rows and columns
KEPT_ELEMENTS_ELSEWHERE = 2**26  # 256 MiB: all tiles up to N = 8,192


class SimCLR(Loss):
    """-sum_ij G_ij log Ghat_ij = repulsion + attraction, with s_ij = <z_i, z_j> / (|z_i| |z_j| tau):

        repulsion   sum_i d_i log sum_{k != i} exp(s_ik)     spread the rows over the sphere
        attraction  -sum_ij G_ij s_ij                        pull positives together

    `reduction="mean"` divides both terms by sum_ij G_ij, which at V = 2 is the usual NT-Xent; `"sum"` does
    not divide. `denominator="negatives"` also leaves the positives of row i out of the sum over k (decoupled
    contrastive learning, Yeh et al. 2022, arXiv:2110.06848). It needs a relation of two or more
    groups, such as Views and Labels. Raises ValueError for tau <= 0 and for an unknown `reduction` or
    `denominator`.
    """

    supports_sharding = capturable = True
    min_rows = 2  # the softmax of a row is over the other rows

    def __init__(self, tau: float = 0.2, reduction: str = "mean", denominator: str = "all") -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau={tau}: expected a number > 0; typical temperatures are 0.1 to 0.5")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction}: expected one of {', '.join(REDUCTIONS)}")
        if denominator not in DENOMINATORS:
            raise ValueError(f"denominator={denominator}: expected one of {', '.join(DENOMINATORS)}")
        self.weights = {"repulsion": 1.0, "attraction": 1.0}
        self.tau, self.reduction, self.denominator = tau, reduction, denominator
        self.needs_groups = denominator == "negatives"

    def check_relation(self, G: Relation) -> None:
        super().check_relation(G)
        if self.needs_groups and G.groups is not None:
            # groups on another device are not read, because that would be a host-device sync
            known = world_size() == 1 and G.groups.device.type == "cpu"
            if G.num_groups == 1 or (known and bool((G.groups == G.groups[0]).all())):
                raise ValueError(
                    "denominator=negatives: expected rows of two or more groups, because one group has no"
                    " negatives; use a larger batch or denominator=all"
                )

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        Z, d = unit_rows(Z), G.degrees.to(Z)
        with torch.no_grad():
            GZ = G @ Z
        positives = all_reduce_replicated(d.sum()).clamp(min=1) if self.reduction == "mean" else 1
        # |s| <= 1 / tau, so exp(s) and its sums stay in range
        exp_is_safe = 1 / self.tau < 0.4 * math.log(torch.finfo(Z.dtype).max)
        repulsion = _SymmetricLogSumExp if world_size() == 1 and exp_is_safe else _WeightedLogSumExp
        return {
            "repulsion": repulsion.apply(Z, d, self.tau, G.groups if self.needs_groups else None) / positives,
            "attraction": -all_reduce_replicated(column_products(Z, GZ).sum()) / (self.tau * positives),
        }


def block_elements(device: torch.device) -> int:
    """Number of similarities to hold in memory at a time."""
    return BLOCK_ELEMENTS if device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE


def tile_sizes(N: int, device: torch.device) -> tuple[int, int]:
    """Return the side of a square tile of N x N similarities, and the number of tiles to keep."""
    on_cpu = device.type == "cpu"
    side = min(N, math.isqrt(block_elements(device)), SIDE if on_cpu else N)
    return side, (KEPT_ELEMENTS if on_cpu else KEPT_ELEMENTS_ELSEWHERE) // side**2


class _SymmetricLogSumExp(torch.autograd.Function):
    """Z (N, K) with unit rows, d (N,) -> sum_i d_i log r_i, r_i = sum_{k != i} exp(s_ik), S = ZZ' / tau.

    With groups (N,), the sum is over the rows k of other groups than that of row i.

    S is computed in square tiles. E = exp(S) is symmetric: each tile on or above the diagonal contributes to
    the sums of its rows and of its columns, and tiles below the diagonal are not computed.

    The gradient is A Z / tau, with the symmetric A_ik = E_ik (d_i / r_i + d_k / r_k). It needs all r, so the
    forward computes it in a second pass over the tiles. A few tiles are kept from the first pass; backward
    keeps no N x N data.
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, d: Tensor, tau: float, groups: Tensor | None) -> Tensor:
        Z, N = Z / tau**0.5, len(Z)
        side, max_kept = tile_sizes(N, Z.device)
        blocks = [slice(start, min(start + side, N)) for start in range(0, N, side)]
        tiles = list(combinations_with_replacement(blocks, 2))
        kept: dict[int, Tensor] = {}

        def exponentials(rows: slice, columns: slice) -> Tensor:
            E = (Z[rows] @ Z[columns].T).exp_()
            if groups is not None:
                return E.masked_fill_(groups[rows, None] == groups[columns], 0)
            return E.fill_diagonal_(0) if rows == columns else E

        r = Z.new_zeros(N)
        for number, (rows, columns) in enumerate(tiles):
            E = exponentials(rows, columns)
            r[rows] += E.sum(1)
            if rows != columns:
                r[columns] += E.sum(0)
            if number < max_kept:
                kept[number] = E
        if ctx.needs_input_grad[0]:
            w, gradient = d / r, torch.zeros_like(Z)
            for number, (rows, columns) in enumerate(tiles):
                A = kept.pop(number) if number in kept else exponentials(rows, columns)
                A *= w[rows, None] + w[columns]
                gradient[rows].addmm_(A, Z[columns])
                if rows != columns:
                    gradient[columns].addmm_(A.T, Z[rows])
            ctx.save_for_backward(gradient.div_(tau**0.5))
        return d @ r.log()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None


class _WeightedLogSumExp(torch.autograd.Function):
    """Z (N, K), d (N,) -> sum_i d_i log sum_{k != i} exp(<z_i, z_k> / tau), computed in blocks of rows.

    With groups (N,), the sum is over the rows k of other groups than that of row i.

    Used in distributed training, and for a tau so small that exp overflows unless the maximum is subtracted.

    A block of rows covers all N columns, so its softmax P is final and its contribution to the gradient,
    (diag(d) P + P' diag(d)) Z / tau, is added in the forward pass. No N x N matrix is kept for backward, and
    none is computed twice.

    Each of W ranks compares its own N / W rows with all N rows, so its P is (N / W, N). The part diag(d) P Z
    is the gradient of its own rows. The part P' diag(d) Z adds to the gradient of all rows: a reduce-scatter
    sums it over the ranks and returns the rows of each rank.
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, d: Tensor, tau: float, groups: Tensor | None) -> Tensor:
        columns, offset = all_gather(Z), rank() * len(Z)
        column_groups = groups if groups is None else all_gather(groups)
        value, row_gradient, column_gradient = Z.new_zeros(()), torch.zeros_like(Z), torch.zeros_like(columns)
        block = max(1, block_elements(Z.device) // len(columns))
        for start in range(0, len(Z), block):
            rows = slice(start, start + block)
            S = Z[rows] @ columns.T / tau
            if groups is None or column_groups is None:
                S.diagonal(offset + start).fill_(-torch.inf)
            else:
                S.masked_fill_(groups[rows, None] == column_groups, -torch.inf)
            lse = S.logsumexp(1, keepdim=True)
            value += (d[rows] * lse[:, 0]).sum()
            if ctx.needs_input_grad[0]:
                P = S.sub_(lse).exp_().mul_(d[rows, None])
                row_gradient[rows] += P @ columns
                column_gradient.addmm_(P.T, Z[rows])
        ctx.save_for_backward(row_gradient.add_(reduce_scatter(column_gradient)).mul_(world_size() / tau))
        return all_reduce_sum(value)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None
