"""Collectives on tensors. Differentiable ones differ in their backward: see the package docstring."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_runner.distributed.group import rank, world_size

# torch 2.14 renames these two functions and deprecates the old names
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def all_reduce_sum(x: Tensor) -> Tensor:
    """All-reduce (sum) without gradient. Returns a new tensor of the shape of x; x itself if W = 1."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def all_reduce_replicated(x: Tensor) -> Tensor:
    """All-reduce (sum) whose result enters the same computation on every rank, such as a loss.

    The incoming gradient is then identical on all ranks. Backward multiplies it by W, without communication.
    """
    return _AllReduceReplicated.apply(x) if world_size() > 1 else x


def all_reduce_sharded(x: Tensor) -> Tensor:
    """All-reduce (sum) whose result each rank combines with its own rows, as in batch norm.

    The incoming gradients differ between ranks, so backward all-reduces them as well.
    """
    return _AllReduceSharded.apply(x) if world_size() > 1 else x


def all_gather_replicated(x: Tensor) -> Tensor:
    """All-gather x (n, ...) -> (W n, ...) whose result enters the same computation on every rank.

    The rows are in rank order. Backward returns W times the gradient of this rank's n rows, without
    communication.
    """
    return _AllGatherReplicated.apply(x) if world_size() > 1 else x


def all_gather(x: Tensor) -> Tensor:
    """All-gather x (n, ...) -> (W n, ...), in rank order, without gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    getattr(dist, ALL_GATHER)(out, x.detach().contiguous())
    return out


def reduce_scatter(x: Tensor) -> Tensor:
    """Reduce-scatter x (W n, ...) -> (n, ...), this rank's chunk of the sum over ranks, without gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(len(x) // world_size(), *x.shape[1:])
    getattr(dist, REDUCE_SCATTER)(out, x.detach().contiguous())
    return out


def shard_indices(n: int, block: int) -> list[Tensor]:
    """Shard the indices 0 .. n - 1: deal blocks of `block` indices to the ranks round-robin.

    Returns one index tensor per rank, empty if there are fewer blocks than ranks.
    """
    blocks = torch.arange(n, device="cpu").split(block)
    return [torch.cat([blocks[0][:0], *blocks[r :: world_size()]]) for r in range(world_size())]


def unshard(x: Tensor, shards: list[Tensor]) -> Tensor:
    """All-gather results of uneven shards and restore the order of the rows.

    On rank r, x (n_r, d) holds the results for the indices shards[r] (n_r,), as returned by `shard_indices`.
    Every rank returns the results for all n indices, (n, d).
    """
    if world_size() == 1:
        return x
    longest = max(map(len, shards))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    whole = x.new_empty(sum(map(len, shards)), *x.shape[1:])
    for part, indices in zip(all_gather(padded).split(longest), shards, strict=True):
        whole[indices.to(x.device)] = part[: len(indices)]
    return whole


class _AllReduceReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = world_size()
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.size * gradient


class _AllReduceSharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


class _AllGatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size, ctx.rank = world_size(), rank()
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.size * gradient.chunk(ctx.size)[ctx.rank]
