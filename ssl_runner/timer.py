"""The time spent in an iterator, measured without a host-device sync."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class IteratorTimer:
    """Seconds that an iterator takes to produce its items.

    On CUDA it is the time between two events of the current stream: that of the kernels of an item, and of
    the stream's wait for the host. Events are read when they are complete. Elsewhere it is the host's time.
    """

    def __init__(self, device: torch.device):
        self.device, self.total = device, 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items."""
        iterator = iter(items)
        while True:
            start = self._event() if self.device.type == "cuda" else time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            if isinstance(start, float):
                self.total += time.perf_counter() - start
            else:
                self.pending.append((start, self._event()))
                while self.pending and self.pending[0][1].query():
                    self._read()
            yield item

    def seconds(self) -> float:
        """Seconds since the last call of this method. Call it after the device has finished the items."""
        while self.pending:
            self._read()
        total, self.total = self.total, 0.0
        return total

    def _read(self) -> None:
        start, end = self.pending.popleft()
        self.total += start.elapsed_time(end) / 1000

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
