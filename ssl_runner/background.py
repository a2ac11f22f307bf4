"""One background thread of a run: it executes jobs in the order in which they were submitted."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

MAX_WAITING = 4  # jobs; `submit` waits while there are more


class Background:
    """Context manager with one thread. On exit it waits for all jobs.

    A job that raises ends the sequence: later jobs are not executed, and the next `submit`, `wait` or the
    exit raises its exception.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "background")
        self.jobs: deque[Future[None]] = deque()
        self.last: Future[None] | None = None

    def submit(self, job: Callable[[], object]) -> Future[None]:
        """Execute `job` after all jobs that were submitted before. Raises the exception of an earlier job."""
        while self.jobs and (self.jobs[0].done() or len(self.jobs) >= MAX_WAITING):
            self.jobs.popleft().result()
        self.last = self.thread.submit(_execute, job, self.last)
        self.jobs.append(self.last)
        return self.last

    def wait(self) -> None:
        """Wait for all jobs. Raises the exception of the first one that failed."""
        if self.last is not None:
            self.last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()  # waits as well, if a signal has interrupted `wait`


def _execute(job: Callable[[], object], previous: Future[None] | None) -> None:
    if previous is not None:
        previous.result()  # raises the exception of the job that failed
    job()
