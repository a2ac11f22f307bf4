"""Preemption: signals that stop a run early, from a scheduler or a user, so that it can be resumed later."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

EXIT = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, run the command again
RETRY_INTERVAL = 0.05  # seconds
REQUEUE_WAIT = 120.0  # seconds for which the other submitit tasks wait until task 0 has requeued the job
MESSAGE = "preempted by {}; the run can be resumed from its last checkpoint"


class Preempted(SystemExit):
    """Raised when the run is preempted and can be resumed later. The exit code of the process is 75.

    A subclass of SystemExit, so `except Exception` does not catch it.
    """

    def __init__(self, message: str):
        super().__init__(EXIT)
        self.message, self.reported = message, False

    def __str__(self) -> str:
        return self.message


class Preemption:
    """Context manager in which SIGTERM and SIGUSR1 raise Preempted.

    Preempted is raised at once, except in two cases. Within `deferred()` it is deferred until the training
    loop has finished its step and written a checkpoint. While another exception is handled, in an `except` or
    `finally` clause or in `__exit__`, it is deferred until that one has been handled: a signal must not
    replace the error of a run that fails. If that error ends the context, a nested context passes the signal
    on to the outer one, and the outermost ignores it.

    Under submitit, SIGUSR2 raises Preempted instead. The original handler of submitit, which requeues the job
    and exits the process, is called on exit from the context. SIGTERM keeps submitit's handler, which ignores
    it: Slurm sends a SIGTERM with every SIGUSR2.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first signal received
        self.deferring = self.closing = False
        self.retry: threading.Timer | None = None  # repeats a signal received while an exception was handled
        self.handled: BaseException | None = None  # the exception that is handled on entry
        self.original_handlers: dict[signal.Signals, Any] = {}
        self.requeue: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self.handled, self.closing = sys.exception(), False
        if threading.current_thread() is threading.main_thread():
            handlers = {
                which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            }
            requeues = {which for which, handler in handlers.items() if is_submitit(handler)}
            for which in requeues - {signal.SIGTERM} or (signal.SIGTERM, signal.SIGUSR1):
                self.original_handlers[which] = signal.signal(which, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Preempted) and self.requeue is not None:
                for which in self.original_handlers:  # inherited by scontrol, which the signal may reach too
                    signal.signal(which, signal.SIG_IGN)
                self.requeue()  # exits the process in task 0, returns in the others
                # if another task exited first, Slurm could kill task 0 before it has requeued the job
                time.sleep(REQUEUE_WAIT)
        finally:
            self.closing = True
            retry, self.retry = self.retry, None
            if retry is not None:
                retry.cancel()
                retry.join()
            for which, handler in self.original_handlers.items():
                signal.signal(which, handler)
            if self.received is not None and not isinstance(error, Preempted) and self._is_nested():
                signal.raise_signal(self.received)

    def _is_nested(self) -> bool:
        handlers = self.original_handlers.values()
        return any(isinstance(getattr(handler, "__self__", None), Preemption) for handler in handlers)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. Signals after the first are ignored: they must not interrupt the shutdown."""
        if self.closing:  # a repetition would come after the context
            self.received = self.received or signal.Signals(number)
            return
        if self.received is not None and self.retry is None:
            return
        if self.retry is not None:
            self.retry.cancel()
        self.received, self.retry = self.received or signal.Signals(number), None
        handler = self.original_handlers[self.received]
        if is_submitit(handler):
            self.requeue = lambda: handler(number, frame)
        if self.deferring:
            return
        if sys.exception() is not self.handled:
            main = threading.main_thread().ident
            self.retry = threading.Timer(RETRY_INTERVAL, signal.pthread_kill, [main, self.received])
            self.retry.daemon = True
            self.retry.start()
            return
        raise Preempted(MESSAGE.format(self.received.name))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer preemption in this context: a signal sets `received`, and Preempted is raised on exit.

        The training loop checks `received` after each step.
        """
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.received is not None:
            raise Preempted(MESSAGE.format(self.received.name))


def is_submitit(handler: Any) -> bool:
    """Return whether a signal handler was installed by submitit, as in a job that submitit runs."""
    return getattr(handler, "__module__", "").startswith("submitit.")
