"""Signals that end a run before its time: a cluster's warning, or a request to stop. The run can go on later."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

EXIT = 75  # EX_TEMPFAIL of sysexits.h: not an error; start it again
PATIENCE = (
    120.0  # seconds that a task of submitit's waits for the first one to put the job back into the queue
)


class Preempted(SystemExit):
    """The run was asked to end and can go on later. Not an error: it passes through `except Exception` and ends the process."""

    def __init__(self, message: str):
        super().__init__(EXIT)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption:
    """A context in which SIGTERM and SIGUSR1 raise Preempted: at once, but within `held()` only where the training loop says so,
    after a whole step and with a checkpoint on disk.

    Under submitit its signal, SIGUSR2, does so instead. submitit's own handler, which puts the job back into the queue and ends
    the process, is called when the context is left. SIGTERM, of which Slurm sends one with every SIGUSR2, stays submitit's, which
    passes over it.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.holding = False
        self.before: dict[signal.Signals, Any] = {}
        self.requeue: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {
                which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            }
            requeues = {which for which, handler in handlers.items() if of_submitit(handler)}
            for which in requeues - {signal.SIGTERM} or (signal.SIGTERM, signal.SIGUSR1):
                self.before[which] = signal.signal(which, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Preempted) and self.requeue is not None:
                self.requeue()  # does not return in the first task
                time.sleep(
                    PATIENCE
                )  # the end of another task could end the first one before it has requeued the job
        finally:
            for which, handler in self.before.items():
                signal.signal(which, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals. The first one counts: another must not interrupt what closes the run."""
        if self.asked is not None:
            return
        self.asked = signal.Signals(number)
        handler = self.before[self.asked]
        if of_submitit(handler):
            self.requeue = lambda: handler(number, frame)
        if not self.holding:
            raise Preempted(f"preempted by {self.asked.name}; the run can go on from its last checkpoint")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it a signal only leaves its name in `asked`; at its end that is raised."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.asked is not None:
            raise Preempted(f"preempted by {self.asked.name}; the run can go on from its last checkpoint")


def of_submitit(handler: Any) -> bool:
    """Whether a signal's handler is one of submitit's, in a job that submitit runs."""
    return getattr(handler, "__module__", "").startswith("submitit.")
