"""Emulated streams, events and asynchronous copies, which arrive when the host or a stream waits for them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.device import HERE


class Mismatch(AssertionError):
    """An operation would fail or race on CUDA."""


class Transfer:
    """An asynchronous copy between pinned memory and the device that the host has not waited for."""

    def __init__(self, host: Tensor, values: Tensor, to_host: bool):
        self.host, self.values, self.to_host, self.done = host, values, to_host, False
        if to_host:
            host.fill_(float("nan") if host.dtype.is_floating_point else 0)

    def complete(self) -> None:
        if self.done:
            return
        self.done = True
        if self.to_host:
            self.host.copy_(self.values)
        elif not torch.equal(self.host, self.values):
            raise Mismatch("pinned memory was written before its copy to the device was complete")


class Stream:
    """A stream: its transfers, the number of its operations, and those of other streams it has waited for."""

    def __init__(self, device: Any = None, **options: Any):
        self.device, self.transfers, self.ticks = HERE, list[Transfer](), 0
        self.seen: dict[Stream, int] = {}

    def add(self, transfer: Transfer) -> None:
        self.transfers = [earlier for earlier in self.transfers if not earlier.done] + [transfer]

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(Event().record(other))

    def wait_event(self, event: "Event") -> None:
        self.transfers += event.transfers
        for stream, ticks in event.seen.items():
            self.seen[stream] = max(ticks, self.seen.get(stream, 0))

    def synchronize(self) -> None:
        Event().record(self).synchronize()


class Event:
    """An event. `query` is true from the third time on: the host is ahead of the device."""

    def __init__(self, enable_timing: bool = False):
        self.transfers, self.seen, self.asked = list[Transfer](), dict[Stream, int](), 0

    def record(self, stream: Stream | None = None) -> "Event":
        stream = stream or current_stream()
        self.transfers, self.seen = [*stream.transfers], {**stream.seen, stream: stream.ticks}
        return self

    def query(self) -> bool:
        self.asked += 1
        if self.asked > 2:
            self.synchronize()
        return self.asked > 2

    def synchronize(self) -> None:
        for transfer in self.transfers:
            transfer.complete()
        for stream, ticks in self.seen.items():
            finished[stream] = max(ticks, finished.get(stream, 0))

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


finished: dict[Stream, int] = {}  # operations that the host has waited for
default_stream, of_thread = Stream(), threading.local()


def current_stream(device: Any = None) -> Stream:
    return getattr(of_thread, "stream", default_stream)


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    before = current_stream()
    of_thread.stream = chosen or before
    yield
    of_thread.stream = before
