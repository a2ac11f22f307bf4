"""One background thread of a run: it executes jobs in the order in which they were submitted."""

import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from ssl_runner.errors import one_line

MAX_WAITING = 1  # jobs; `submit` waits while there are more, so that a checkpoint does not wait for long


class Background:
    """Context manager with one thread. On exit it waits for all jobs.

    A job that raises ends the sequence: later jobs are not executed, and the next `submit`, `wait` or the
    exit raises its exception, unless the exit is due to another one.
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

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:  # the first error is the one to report
                print(f"also failed, in the background: {one_line(failure)}", file=sys.stderr, flush=True)
        finally:
            self.thread.shutdown()  # waits as well, if a signal has interrupted `wait`


def _execute(job: Callable[[], object], previous: Future[None] | None) -> None:
    if previous is not None:
        previous.result()  # raises the exception of the job that failed
    job()
