"""Data-parallel training on W ranks: process group, failure handling, collectives with and without gradients.

Without a process group (W = 1) every collective is the identity.

Each rank holds an equal shard of the rows of a batch, and all ranks compute the same loss, that of the global
batch. DistributedDataParallel averages gradients over ranks, so each rank must compute W times the gradient
contributed by its shard. The differentiable collectives below include this factor. A plain in-place
`dist.all_reduce` yields 1/W of this gradient: autograd does not record that the sum depends on all ranks.
"""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_runner.preemption import EXIT, Preempted

TIMEOUT = timedelta(hours=1)  # of rendezvous and collectives
LOOK = 1.0  # seconds between two checks of whether another rank has failed
GRACE = 10.0  # seconds that a rank has to exit by itself after another rank has failed

# torch 2.14 renames these two functions and deprecates the old names
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Place:
    """Rank, world size and local rank (rank within its node) of this process."""

    rank: int
    size: int
    local_rank: int


def place() -> Place | None:
    """Return rank, world size and local rank as set by torchrun or srun.

    Returns None if neither launched this process, or if the world size is 1.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:  # unset in the batch script itself
        found = Place(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    else:
        return None
    return found if found.size > 1 else None


def address_from_slurm() -> None:
    """Set MASTER_ADDR and MASTER_PORT for a Slurm job step, unless they are set.

    The address is the first node of the step. The port is derived from the job and step ids, so that jobs on
    one node use different ports.
    """
    env = os.environ
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        env["MASTER_ADDR"] = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()[0]
    step = 31 * int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(20_000 + step % 40_000))


class _Group:
    """Per-process state: rendezvous store, gloo group for Python objects, failure-watching thread."""

    def __init__(self, here: Place):
        if "RANK" not in os.environ:
            address_from_slurm()
        self.store, _, _ = next(dist.rendezvous("env://", here.rank, here.size, timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=self.store, rank=here.rank, world_size=here.size, timeout=TIMEOUT
        )
        self.control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.ended, self.grace = threading.Event(), GRACE
        self.last_words: Callable[[int, str], None] = lambda code, message: None
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def watch(self) -> None:
        """Exit this process if another rank has failed and this one is still running after the grace period.

        Runs in a thread, since the main thread may block in a collective that the failed rank never joins.
        """
        while not self.ended.wait(LOOK):
            try:
                failure = self.store.get("failure").decode() if self.store.check(["failure"]) else None
            except RuntimeError:  # rank 0, which hosts the store, has exited
                failure = "1 rank 0 has exited, and with it the rendezvous store"
            if failure is not None:
                code, _, message = failure.partition(" ")
                if not self.ended.wait(self.grace):
                    self.last_words(int(code), message)
                    os._exit(int(code))
                return


_group: _Group | None = None


def start() -> None:
    """Initialise the process group. Does nothing if W = 1 or if the group is already initialised."""
    global _group
    here = place()
    if here is not None and _group is None:
        _group = _Group(here)


def finish() -> None:
    """Wait for all ranks (barrier), then destroy the process group."""
    global _group
    if _group is not None:
        dist.barrier(_group.control)
        _group.ended.set()
        _group.watcher.join(LOOK)  # it must not access the store after its destruction
        dist.destroy_process_group()
        _group = None


def dismiss() -> None:
    """Release the ranks that wait in `share` for a task, by broadcasting None, then leave the group.

    Called on rank 0.
    """
    if _group is not None:
        share(None)
        finish()


class Lost(RuntimeError):
    """Raised on a rank when another rank has failed."""


@contextmanager
def together(say: Callable[[int, str], None]) -> Iterator[None]:
    """Context manager that propagates failures: an exception on one rank ends the context on all ranks.

    Ranks that fail as a consequence raise Lost with the message of the first failure, or Preempted if the
    first rank was preempted. Other exceptions of this package are re-raised unchanged.

    If this process is still running GRACE seconds after the failure, the watching thread calls
    say(exit code, message) and exits the process.
    """
    if _group is None:
        yield
        return
    _group.last_words = say
    try:
        yield
    except BaseException as error:
        code, cause = failed(error)
        if code == EXIT:
            _group.ended.set()  # stop the watching thread: shutdown, such as a requeue, may take longer
        ours = type(error).__module__.startswith("ssl_runner") and not isinstance(error, Preempted)
        if ours or cause == words(error):
            raise
        raise (Preempted(cause) if code == EXIT else Lost(cause)) from error


def failed(error: BaseException) -> tuple[int, str]:
    """Report an error to the other ranks through the store.

    Returns exit code and message of the first error reported by any rank. Without a process group: 1 and the
    message of this error.
    """
    if _group is None:
        return 1, str(error)
    first = mine = f"{EXIT if isinstance(error, Preempted) else 1} {words(error)}"
    with suppress(RuntimeError):  # raised if rank 0, which hosts the store, has exited
        first = _group.store.compare_set("failure", "", mine).decode()
    code, _, cause = first.partition(" ")
    return int(code), cause


def words(error: BaseException) -> str:
    """Return the one-line message with which an error is reported to the other ranks."""
    if isinstance(error, Preempted):
        return str(error)
    kind = "" if type(error).__module__.startswith("ssl_runner") else f"{type(error).__name__}: "
    return f"rank {dist.get_rank()} of {dist.get_world_size()}: {kind}{' '.join(str(error).split())}"


@contextmanager
def alone() -> Iterator[None]:
    """Context manager that turns collectives off: `size()` is 1 and `rank()` is 0.

    For computations on rows that every rank already holds.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def size() -> int:
    """Return the world size W, or 1 without a process group and within `alone()`."""
    return (
        1 if _alone.get() or not dist.is_available() or not dist.is_initialized() else dist.get_world_size()
    )


def rank() -> int:
    """Return the rank of this process, or 0 without a process group and within `alone()`."""
    return dist.get_rank() if size() > 1 else 0


def leads() -> bool:
    """Return whether this is the main process (rank 0), which writes files and prints. Ignores `alone()`."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


# --- Python objects ---


def share(thing: Any) -> Any:
    """Broadcast a picklable object from rank 0; return it on every rank."""
    if size() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things, src=0, group=_control())
    return things[0]


def collect(thing: Any) -> list[Any]:
    """All-gather picklable objects: return the objects of all ranks, in rank order, on every rank."""
    if size() == 1:
        return [thing]
    things: list[Any] = [None] * size()
    dist.all_gather_object(things, thing, group=_control())
    return things


@contextmanager
def in_turn() -> Iterator[None]:
    """Context manager that runs its body in three phases, separated by barriers.

    The phases are: rank 0, then the first rank of every other node, then all remaining ranks.
    Later ranks can reuse files that earlier ranks have downloaded or decoded.
    """
    here = place()
    if size() == 1 or here is None:
        yield
        return
    mine = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    for _ in range(mine):
        dist.barrier(_control())
    yield
    for _ in range(2 - mine):
        dist.barrier(_control())


class Vote:
    """Asynchronous maximum over ranks of an integer >= 0.

    Each call returns the same value on all ranks. For W > 1, a call starts an asynchronous all-reduce and
    returns the result of the one started by the previous call (0 on the first call). The all-reduce overlaps
    with the computation between the two calls. For W = 1, a call returns its argument.
    """

    def __init__(self) -> None:
        self.flying: tuple[Any, Tensor] | None = None

    def __call__(self, asked: int) -> int:
        if size() == 1:
            return asked
        answer = 0
        if self.flying is not None:
            work, votes = self.flying
            work.wait()
            answer = int(votes)
        votes = torch.tensor(asked)
        self.flying = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control(), async_op=True), votes
        return answer


def _control() -> Any:
    return _group.control if _group is not None else None


# --- tensors ---


def summed(x: Tensor) -> Tensor:
    """All-reduce (sum) without gradient. Returns a new tensor of the shape of x; x itself if W = 1."""
    if size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def total(x: Tensor) -> Tensor:
    """All-reduce (sum) whose result enters the same computation on every rank, such as a loss.

    The incoming gradient is then identical on all ranks. Backward multiplies it by W, without communication.
    """
    return _Total.apply(x) if size() > 1 else x


def pooled(x: Tensor) -> Tensor:
    """All-reduce (sum) whose result each rank combines with its own rows, as in batch norm.

    The incoming gradients differ between ranks, so backward all-reduces them as well.
    """
    return _Pooled.apply(x) if size() > 1 else x


def gather(x: Tensor) -> Tensor:
    """All-gather x (n, ...) -> (W n, ...) whose result enters the same computation on every rank.

    The rows are in rank order. Backward returns W times the gradient of this rank's n rows, without
    communication.
    """
    return _Gather.apply(x) if size() > 1 else x


def gathered(x: Tensor) -> Tensor:
    """All-gather x (n, ...) -> (W n, ...), in rank order, without gradient."""
    if size() == 1:
        return x
    out = x.new_empty(size() * len(x), *x.shape[1:])
    getattr(dist, ALL_GATHER)(out, x.detach().contiguous())
    return out


def scattered(x: Tensor) -> Tensor:
    """Reduce-scatter x (W n, ...) -> (n, ...), this rank's chunk of the sum over ranks, without gradient."""
    if size() == 1:
        return x
    out = x.new_empty(len(x) // size(), *x.shape[1:])
    getattr(dist, REDUCE_SCATTER)(out, x.detach().contiguous())
    return out


def dealt(n: int, block: int) -> list[Tensor]:
    """Shard the indices 0 .. n - 1: deal blocks of `block` indices to the ranks round-robin.

    Returns one index tensor per rank, empty if there are fewer blocks than ranks.
    """
    blocks = torch.arange(n).split(block)
    return [torch.cat([torch.arange(0), *blocks[r :: size()]]) for r in range(size())]


def assembled(x: Tensor, rows: list[Tensor]) -> Tensor:
    """All-gather results of uneven shards and restore the order of the rows.

    On rank r, x (n_r, d) holds the results for the indices rows[r] (n_r,), which `dealt` returned. Every rank
    returns the results for all n indices, (n, d).
    """
    if size() == 1:
        return x
    longest = max(map(len, rows))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    whole = x.new_empty(sum(map(len, rows)), *x.shape[1:])
    for part, indices in zip(gathered(padded).split(longest), rows, strict=True):
        whole[indices.to(x.device)] = part[: len(indices)]
    return whole


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = size()
        return summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.size * gradient


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size, ctx.rank = size(), rank()
        return gathered(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.size * gradient.chunk(ctx.size)[ctx.rank]
