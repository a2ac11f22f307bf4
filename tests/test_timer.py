"""The time in an iterator, on the host and by events of a device."""

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.testing import assert_close

from ssl_runner.timer import IteratorTimer
from tests.device import pretended
from tests.helpers import CPU, pretraining


def slow_items() -> Iterator[int]:
    for number in range(3):
        time.sleep(0.02)
        yield number


def test_timer_counts_the_iterator_and_not_its_consumer() -> None:
    timer, items = IteratorTimer(CPU), []
    for item in timer(slow_items()):
        items.append(item)
        time.sleep(0.2)
    assert items == [0, 1, 2]
    assert 0.06 <= timer.seconds() < 0.3
    assert timer.seconds() == 0


class Event:
    """An event of a device whose clock is `now` (ms). It is complete `lag` ms later."""

    now, lag = 0.0, 25.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.time = Event.now

    def query(self) -> bool:
        return Event.now >= self.time + Event.lag

    def elapsed_time(self, end: "Event") -> float:
        return end.time - self.time


def test_timer_reads_events_that_are_complete() -> None:
    """Items take 10 ms each, and their consumer 20 ms."""

    def items() -> Iterator[int]:
        for number in range(5):
            Event.now += 10
            yield number

    timer = IteratorTimer(torch.device("cuda"))
    with mock.patch.multiple(torch.cuda, Event=Event, current_stream=lambda device: None):
        for _ in timer(items()):
            assert len(timer.pending) <= 2
            Event.now += 20
    assert_close(timer.seconds(), 0.05)


def test_timer_does_not_sync_on_the_device() -> None:
    with pretended():
        assert list(IteratorTimer(torch.device("cuda"))(range(3))) == [0, 1, 2]


def test_row_has_the_seconds_of_the_epoch() -> None:
    training = pretraining()
    start = time.perf_counter()
    rows = list(training.epochs())
    wall = time.perf_counter() - start
    parts = [sum(row[f"seconds_{part}"] for part in ("views", "step", "checkpoint")) for row in rows]
    assert all(row[f"seconds_{part}"] > 0 for row in rows for part in ("views", "step"))
    assert sum(parts) <= wall + 1e-3
    assert_close(
        rows[-1]["seconds"], sum(r["seconds_views"] + r["seconds_step"] for r in rows), rtol=0, atol=2e-3
    )
    for row, seconds in zip(rows, parts, strict=True):
        assert row["images_per_s"] == pytest.approx(60 / seconds, rel=0.02)
