"""The process group: launch information, start and end, and the propagation of failures to all ranks."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssl_runner.preemption import EXIT, Preempted

TIMEOUT = timedelta(hours=1)  # of rendezvous and collectives
POLL_INTERVAL = 1.0  # seconds between two checks of whether another rank has failed
GRACE_PERIOD = 10.0  # seconds that a rank has to exit by itself after another rank has failed

_local_only: ContextVar[bool] = ContextVar("local_only", default=False)


@dataclass(frozen=True)
class RankInfo:
    """Rank, world size and local rank (rank within its node) of this process."""

    rank: int
    world_size: int
    local_rank: int


def rank_info() -> RankInfo | None:
    """Return rank, world size and local rank as set by torchrun or srun.

    Returns None if neither launched this process, or if the world size is 1.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:  # unset in the batch script itself
        found = RankInfo(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    else:
        return None
    return found if found.world_size > 1 else None


def set_address_from_slurm() -> None:
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

    def __init__(self, here: RankInfo):
        if "RANK" not in os.environ:
            set_address_from_slurm()
        # the watching thread needs a connection of its own: a wait in a store, such as that of NCCL for
        # another rank, blocks every other use of its connection
        self.store, self.watched = (
            next(dist.rendezvous("env://", here.rank, here.world_size, timeout=TIMEOUT))[0] for _ in range(2)
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=self.store, rank=here.rank, world_size=here.world_size, timeout=TIMEOUT
        )
        self.control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.rank, self.ended, self.grace = here.rank, threading.Event(), GRACE_PERIOD
        self.on_peer_failure: Callable[[int, str], None] = lambda code, message: None
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def watch(self) -> None:
        """Exit this process if another rank has failed and this one is still running after the grace period.

        Rank 0 prints the message. Runs in a thread, since the main thread may block in a collective that the
        failed rank never joins.
        """
        while not self.ended.wait(POLL_INTERVAL):
            try:
                failed = self.watched.check(["failure"])
                failure = self.watched.get("failure").decode() if failed else None
            except RuntimeError:  # rank 0, which hosts the store, has exited
                failure = "1 rank 0 has exited, and with it the rendezvous store"
            if failure is not None:
                code, _, message = failure.partition(" ")
                if not self.ended.wait(self.grace):
                    try:
                        if self.rank == 0:
                            print(message, file=sys.stderr, flush=True)
                        self.on_peer_failure(int(code), message)
                    finally:
                        os._exit(int(code))
                return


_group: _Group | None = None


def start() -> None:
    """Initialise the process group. Does nothing if W = 1 or if the group is already initialised."""
    global _group
    here = rank_info()
    if here is not None and _group is None:
        _group = _Group(here)


def finish() -> None:
    """Wait for all ranks (barrier), then destroy the process group."""
    global _group
    if _group is not None:
        dist.barrier(_group.control)
        _group.ended.set()
        _group.watcher.join(POLL_INTERVAL)  # it must not access the store after its destruction
        dist.destroy_process_group()
        _group = None


def on_peer_failure(function: Callable[[int, str], None]) -> None:
    """Set what the watching thread calls, with exit code and message, before it exits the process.

    Replaced by that of `propagate_failures`.
    """
    if _group is not None:
        _group.on_peer_failure = function


class PeerFailed(RuntimeError):
    """Raised on a rank when another rank has failed."""


@contextmanager
def propagate_failures(handler: Callable[[int, str], None]) -> Iterator[None]:
    """Context manager that propagates failures: an exception on one rank ends the context on all ranks.

    Ranks that fail as a consequence raise PeerFailed with the message of the first failure, or Preempted if
    the first rank was preempted. Other exceptions of this package are re-raised unchanged.

    If this process is still running GRACE_PERIOD seconds after the failure, the watching thread calls
    handler(exit code, message) and exits the process.
    """
    if _group is None:
        yield
        return
    _group.on_peer_failure = handler
    try:
        yield
    except BaseException as error:
        code, cause = report_failure(error)
        if code == EXIT:
            _group.ended.set()  # stop the watching thread: shutdown, such as a requeue, may take longer
        ours = type(error).__module__.startswith("ssl_runner") and not isinstance(error, Preempted)
        if ours or cause == failure_message(error):
            raise
        raise (Preempted(cause) if code == EXIT else PeerFailed(cause)) from error


def report_failure(error: BaseException) -> tuple[int, str]:
    """Report an error to the other ranks through the store.

    Returns exit code and message of the first error reported by any rank. Without a process group: 1 and the
    message of this error.
    """
    if _group is None:
        return 1, str(error)
    first = mine = f"{EXIT if isinstance(error, Preempted) else 1} {failure_message(error)}"
    with suppress(RuntimeError):  # raised if rank 0, which hosts the store, has exited
        first = _group.store.compare_set("failure", "", mine).decode()
    code, _, cause = first.partition(" ")
    return int(code), cause


def failure_message(error: BaseException) -> str:
    """Return the one-line message with which an error is reported to the other ranks."""
    if isinstance(error, Preempted):
        return str(error)
    kind = "" if type(error).__module__.startswith("ssl_runner") else f"{type(error).__name__}: "
    return f"rank {dist.get_rank()} of {dist.get_world_size()}: {kind}{' '.join(str(error).split())}"


@contextmanager
def local_only() -> Iterator[None]:
    """Context manager that turns collectives off: `world_size()` is 1 and `rank()` is 0.

    For computations on rows that every rank already holds.
    """
    token = _local_only.set(True)
    try:
        yield
    finally:
        _local_only.reset(token)


def world_size() -> int:
    """Return the world size W, or 1 without a process group and within `local_only()`."""
    return dist.get_world_size() if _initialized() and not _local_only.get() else 1


def rank() -> int:
    """Return the rank of this process, or 0 without a process group and within `local_only()`."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes files and prints. Not affected by `local_only()`."""
    return not _initialized() or dist.get_rank() == 0


def control_group() -> Any:
    """Return the gloo group for Python objects and barriers, or None without a process group."""
    return _group.control if _group is not None else None


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
