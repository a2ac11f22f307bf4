"""Collectives on Python objects and integers, over the gloo group of the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_runner.distributed.group import control_group, finish, rank_info, world_size


def release_ranks() -> None:
    """Release the ranks that wait in `broadcast_object` by broadcasting None, then leave the group.

    Called on rank 0.
    """
    if control_group() is not None:
        broadcast_object(None)
        finish()


def broadcast_object(value: Any) -> Any:
    """Broadcast a picklable object from rank 0; return it on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=control_group())
    return values[0]


def all_gather_object(value: Any) -> list[Any]:
    """All-gather picklable objects: return the objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Context manager that runs its body in three phases, separated by barriers.

    The phases are: rank 0, then the first rank of every other node, then all remaining ranks.
    Later ranks can reuse files that earlier ranks have downloaded or decoded.
    """
    here = rank_info()
    if world_size() == 1 or here is None:
        yield
        return
    phase = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    for _ in range(phase):
        dist.barrier(control_group())
    yield
    for _ in range(2 - phase):
        dist.barrier(control_group())


class AsyncMax:
    """Asynchronous maximum over ranks of an integer >= 0.

    Each call returns the same value on all ranks. For W > 1, a call starts an asynchronous all-reduce and
    returns the result of the one started by the previous call (0 on the first call). The all-reduce overlaps
    with the computation between the two calls. For W = 1, a call returns its argument.
    """

    def __init__(self) -> None:
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, value: int) -> int:
        if world_size() == 1:
            return value
        previous = 0
        if self.pending is not None:
            work, maximum = self.pending
            work.wait()
            previous = int(maximum)
        maximum = torch.tensor(value, device="cpu")
        work = dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=control_group(), async_op=True)
        self.pending = work, maximum
        return previous
