"""Maximum manifold capacity representations (Yerxa et al. 2023) on relations of groups."""

from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, all_reduce_sum
from ssl_runner.loss.base import Loss
from ssl_runner.loss.kernels import first_derivative, unit_rows
from ssl_runner.relation import Relation


class MMCR(Loss):
    """centroids + alpha * manifolds, with unit rows z_i / |z_i| and M groups of positives:

        centroids  -|C|_*                  C (M, K): mean of each group's unit rows. Long, spread centroids
        manifolds  (1/M) sum_g |Z_g|_*     Z_g: the unit rows of group g. Compact groups; only for alpha > 0

    |.|_* is the nuclear norm, the sum of the singular values (arXiv:2303.03307). The relation must consist of
    groups. alpha > 0 needs those of Views, which have one size. A row without positives is a group.

    The nuclear norm is not differentiable where C is rank deficient. The gradient is the subgradient of
    smallest norm, UV' over the singular values above max(M, K) eps of the largest.

    In distributed training the (M, K) sums over groups are all-reduced and each rank computes the same
    decomposition. On CUDA it causes a host-device sync in each step, so a step cannot be captured.
    """

    supports_sharding = True
    needs_groups = True

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        self.alpha, self.needs_views = alpha, alpha > 0
        self.weights = {"centroids": 1.0} | ({"manifolds": alpha} if alpha else {})

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        Z, M, y = unit_rows(Z), G.num_groups, G.groups
        assert M is not None
        assert y is not None
        sums = all_reduce_replicated(Z.new_zeros(M, Z.shape[1]).index_add(0, y, Z))
        sizes = all_reduce_sum(Z.new_zeros(M).index_add(0, y, Z.new_ones(len(Z))))
        terms = {"centroids": -_NuclearNorm.apply(sums / sizes.clamp(min=1)[:, None])}
        if self.alpha:
            manifolds = Z.unflatten(0, (G.V, -1)).transpose(0, 1)  # (n, V, K)
            terms["manifolds"] = all_reduce_replicated(_NuclearNorm.apply(manifolds).sum()) / M
        return terms


class _NuclearNorm(torch.autograd.Function):
    """Matrices (..., M, K) -> sums of their singular values (...).

    nan for a matrix with entries that are not finite, for which torch.linalg.svd raises an error.
    """

    @staticmethod
    def forward(ctx: Any, C: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(C.nan_to_num(0, 0, 0), full_matrices=False)
        nonzero = s > max(C.shape[-2:]) * torch.finfo(C.dtype).eps * s[..., :1]
        ctx.save_for_backward((U * nonzero[..., None, :]) @ Vh)
        return s.sum(-1) + (C - C).sum((-2, -1))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (UV,) = ctx.saved_tensors
        return upstream[..., None, None] * UV
