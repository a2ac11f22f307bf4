"""TODO distributed.objects"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_runner.distributed.group import control_group, finish, rank_info, world_size


def release_ranks() -> None:
    """Release the ranks that wait in `share` for a task, by broadcasting None, then leave the group.

    Called on rank 0.
    """
    if control_group() is not None:
        broadcast_object(None)
        finish()


# --- Python objects ---


def broadcast_object(thing: Any) -> Any:
    """Broadcast a picklable object from rank 0; return it on every rank."""
    if world_size() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things, src=0, group=control_group())
    return things[0]


def all_gather_object(thing: Any) -> list[Any]:
    """All-gather picklable objects: return the objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing, group=control_group())
    return things


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
    mine = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    for _ in range(mine):
        dist.barrier(control_group())
    yield
    for _ in range(2 - mine):
        dist.barrier(control_group())


class AsyncMax:
    """Asynchronous maximum over ranks of an integer >= 0.

    Each call returns the same value on all ranks. For W > 1, a call starts an asynchronous all-reduce and
    returns the result of the one started by the previous call (0 on the first call). The all-reduce overlaps
    with the computation between the two calls. For W = 1, a call returns its argument.
    """

    def __init__(self) -> None:
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, asked: int) -> int:
        if world_size() == 1:
            return asked
        answer = 0
        if self.pending is not None:
            work, votes = self.pending
            work.wait()
            answer = int(votes)
        votes = torch.tensor(asked)
        self.pending = (
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=control_group(), async_op=True),
            votes,
        )
        return answer
