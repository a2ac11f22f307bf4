"""SimCLR (Chen et al. 2020) on any relation G, in O(N * block) memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.distributed import gathered, rank, scattered, size, summed, total
from ssl_runner.loss.base import Loss
from ssl_runner.relation import Relation

BLOCK_ELEMENTS = 2**22  # similarities held at a time: 16 MiB in float32


class SimCLR(Loss):
    """-sum_ij G_ij log Ghat_ij = repulsion + attraction, with s_ij = <z_i, z_j> / (|z_i| |z_j| tau):

        repulsion   sum_i d_i log sum_{k != i} exp(s_ik)     rows spread over the sphere
        attraction  -sum_ij G_ij s_ij                        related rows meet

    `reduction="mean"` divides both by sum_ij G_ij, which at V = 2 is the usual NT-Xent; `"sum"` does not.
    """

    reduces = True

    def __init__(self, tau: float = 0.5, reduction: str = "mean") -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau={tau} is not a temperature: give a number > 0")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction} is not one of: mean, sum")
        self.weights = {"repulsion": 1.0, "attraction": 1.0}
        self.tau, self.reduction = tau, reduction

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        Z, d = F.normalize(Z), G.degrees.to(Z)
        positives = total(d.sum()).clamp(min=1) if self.reduction == "mean" else 1
        return {
            "repulsion": _WeightedLogSumExp.apply(Z, d, self.tau) / positives,
            "attraction": -total((Z * (G @ Z)).sum()) / (self.tau * positives),
        }


class _WeightedLogSumExp(torch.autograd.Function):
    """Z (N, K), d (N,) -> sum_i d_i log sum_{k != i} exp(<z_i, z_k> / tau), taken over blocks of rows.

    A block of rows sees all N columns, so its softmax P is final when the block is done, and its part of the gradient,
    (diag(d) P + P' diag(d)) Z / tau, is added up at once: nothing of size N x N is kept for backward or computed twice.

    Of several processes each compares its own N / W rows with all N: P Z is the gradient of its own rows, P' Z that of all,
    of which each process gets the sum for its own ones.
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, d: Tensor, tau: float) -> Tensor:
        columns, first = gathered(Z), rank() * len(Z)
        value, own, of_all = Z.new_zeros(()), torch.zeros_like(Z), torch.zeros_like(columns)
        block = max(1, BLOCK_ELEMENTS // len(columns))
        for start in range(0, len(Z), block):
            rows = slice(start, start + block)
            S = Z[rows] @ columns.T / tau
            S.diagonal(first + start).fill_(-torch.inf)
            lse = S.logsumexp(1, keepdim=True)
            value += (d[rows] * lse[:, 0]).sum()
            if ctx.needs_input_grad[0]:
                P = S.sub_(lse).exp_().mul_(d[rows, None])
                own[rows] += P @ columns
                of_all.addmm_(P.T, Z[rows])
        ctx.save_for_backward(own.add_(scattered(of_all)).mul_(size() / tau))
        return summed(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
