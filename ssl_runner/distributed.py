"""Several processes that train one network: who they are, sums and gathers with gradients; in one process, the identity.

Each process holds an equal part of the rows of a batch and computes the same loss, that of all rows. Gradients are averaged over
the processes, as DistributedDataParallel does; so the gradient that a process computes is W times its own part of the loss's.
(An in-place all_reduce would give 1/W of it: autograd does not see that the other processes' rows are in the sum.)
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

TIMEOUT = timedelta(hours=1)  # a process that waits so long for the others gives up
LOOK = 1.0  # seconds between looks at whether another process has failed
GRACE = 10.0  # seconds that a process then has to end by itself

# torch 2.14 gives these two another name, and warns of the old one
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Place:
    """This process among those of one training run: its number, how many there are, and its number on its machine."""

    rank: int
    size: int
    local_rank: int


def place() -> Place | None:
    """Where torchrun, or srun with several tasks, has put this process; None for a process that trains by itself."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:  # a batch script itself has no step
        found = Place(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    else:
        return None
    return found if found.size > 1 else None


def address_from_slurm() -> None:
    """MASTER_ADDR and MASTER_PORT of a job step, where they are not given: its first machine, and a port of its own."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        env["MASTER_ADDR"] = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()[0]
    step = 31 * int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(20_000 + step % 40_000))


class _Group:
    """What a process that is one of several keeps: the store, a gloo group for what is no tensor, and the thread that watches."""

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
        """Ends this process, should it not end by itself, once another has failed: a collective would wait for that one."""
        while not self.ended.wait(LOOK):
            try:
                failure = self.store.get("failure").decode() if self.store.check(["failure"]) else None
            except RuntimeError:  # the store has gone, and so has the process that kept it
                failure = "1 process 0 is gone"
            if failure is not None:
                code, _, message = failure.partition(" ")
                if not self.ended.wait(self.grace):
                    self.last_words(int(code), message)
                    os._exit(int(code))
                return


_group: _Group | None = None


def start() -> None:
    """Joins the other processes; does nothing in a process by itself, or a second time."""
    global _group
    here = place()
    if here is not None and _group is None:
        _group = _Group(here)


def finish() -> None:
    """Leaves the others, once all have come so far."""
    global _group
    if _group is not None:
        dist.barrier(_group.control)
        _group.ended.set()
        _group.watcher.join(LOOK)  # it must not look into a store that is gone
        dist.destroy_process_group()
        _group = None


def dismiss() -> None:
    """Tells the other processes, who wait for process 0 to share a task, that there is none; and leaves them."""
    if _group is not None:
        share(None)
        finish()


class Lost(RuntimeError):
    """Another process has failed, and so this one cannot go on."""


@contextmanager
def together(say: Callable[[int, str], None]) -> Iterator[None]:
    """A context that all processes end in the same way: once one has raised something, it raises Lost with the first one's words,
    or Preempted, in the others. `say` is called with the exit code and these words where a process can only be ended from
    outside."""
    if _group is None:
        yield
        return
    _group.last_words = say
    try:
        yield
    except BaseException as error:
        code, cause = failed(error)
        if code == EXIT:
            _group.ended.set()  # what is left to do, such as a requeue, may take its time
        ours = type(error).__module__.startswith("ssl_runner") and not isinstance(error, Preempted)
        if ours or cause == words(error):
            raise
        raise (Preempted(cause) if code == EXIT else Lost(cause)) from error


def failed(error: BaseException) -> tuple[int, str]:
    """Tells the other processes of an error; returns the exit code and the words of the first one that was told."""
    if _group is None:
        return 1, str(error)
    first = mine = f"{EXIT if isinstance(error, Preempted) else 1} {words(error)}"
    with suppress(RuntimeError):  # the store may have gone
        first = _group.store.compare_set("failure", "", mine).decode()
    code, _, cause = first.partition(" ")
    return int(code), cause


def words(error: BaseException) -> str:
    """What to tell the other processes of an error."""
    if isinstance(error, Preempted):
        return str(error)
    kind = "" if type(error).__module__.startswith("ssl_runner") else f"{type(error).__name__}: "
    return f"process {dist.get_rank()} of {dist.get_world_size()}: {kind}{' '.join(str(error).split())}"


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes by itself, on rows that all processes have."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def size() -> int:
    """The number of processes, W."""
    return (
        1 if _alone.get() or not dist.is_available() or not dist.is_initialized() else dist.get_world_size()
    )


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def leads() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


# --- what is no tensor --------------------------------------------------------------------------------------------------------


def share(thing: Any) -> Any:
    """Process 0's thing, in every process."""
    if size() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things, src=0, group=_control())
    return things[0]


def collect(thing: Any) -> list[Any]:
    """Every process's thing, in every process."""
    if size() == 1:
        return [thing]
    things: list[Any] = [None] * size()
    dist.all_gather_object(things, thing, group=_control())
    return things


@contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 goes first, then the first process of every other machine, then the rest: what one has downloaded or decoded,
    the next ones find."""
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
    """The most that any process asks for, from 0. All get the same answer at the same call, and none waits: with several
    processes the answer is that to the call before, whose exchange has run meanwhile."""

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


# --- sums and gathers ---------------------------------------------------------------------------------------------------------


def summed(x: Tensor) -> Tensor:
    """x -> its sum over the processes, a constant."""
    if size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def total(x: Tensor) -> Tensor:
    """x -> its sum over the processes, for what every process then computes alike, such as the loss. Its gradient is the same
    everywhere, so going back takes no exchange."""
    return _Total.apply(x) if size() > 1 else x


def pooled(x: Tensor) -> Tensor:
    """x -> its sum over the processes, for what each process then combines with rows of its own. Going back, the gradients are
    summed, too."""
    return _Pooled.apply(x) if size() > 1 else x


def gather(x: Tensor) -> Tensor:
    """x (n, ...) -> those of all processes, (W n, ...), for what every process then computes alike."""
    return _Gather.apply(x) if size() > 1 else x


def gathered(x: Tensor) -> Tensor:
    """x (n, ...) -> those of all processes, (W n, ...), constants."""
    if size() == 1:
        return x
    out = x.new_empty(size() * len(x), *x.shape[1:])
    getattr(dist, ALL_GATHER)(out, x.detach().contiguous())
    return out


def scattered(x: Tensor) -> Tensor:
    """x (W n, ...) -> the sum over the processes of their own n rows, constants."""
    if size() == 1:
        return x
    out = x.new_empty(len(x) // size(), *x.shape[1:])
    getattr(dist, REDUCE_SCATTER)(out, x.detach().contiguous())
    return out


def dealt(n: int, block: int) -> list[Tensor]:
    """Which of n rows each process is to compute: blocks of them in turn."""
    blocks = torch.arange(n).split(block)
    return [torch.cat([torch.arange(0), *blocks[r :: size()]]) for r in range(size())]


def assembled(x: Tensor, rows: list[Tensor]) -> Tensor:
    """x (n_r, d), what process r has computed for rows[r] (n_r,) of n -> the result for all (n, d), in every process."""
    if size() == 1:
        return x
    longest = max(map(len, rows))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    whole = x.new_empty(sum(map(len, rows)), *x.shape[1:])
    for part, places in zip(gathered(padded).split(longest), rows, strict=True):
        whole[places.to(x.device)] = part[: len(places)]
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
