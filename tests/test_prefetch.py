"""Prefetching of images in host memory, with stand-ins for CUDA's streams and events."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ssl_runner.data.images import Images, PinnedBuffer, Prefetcher, prefetcher_of
from tests.helpers import CPU

CUDA = torch.device("cuda", 0)


class Event:
    """An event that is complete after `synchronize`."""

    complete = False

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        self.complete = True


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.waits_for: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waits_for.append(other)


@contextmanager
def emulated() -> Iterator[list[Tensor]]:
    """Emulate CUDA with CPU tensors. Yields the pinned buffers that are allocated."""
    allocated, empty, to, compute = [], torch.empty, Tensor.to, Stream(CUDA)

    def pinned_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        allocated.extend([tensor] if pin_memory else [])
        return tensor

    stand_ins = {
        "Event": Event,
        "Stream": Stream,
        "stream": nullcontext,
        "current_stream": lambda device: compute,
        "set_device": lambda device: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(torch, "empty", pinned_empty),
        mock.patch.object(Tensor, "to", lambda x, device, non_blocking=False: to(x, CPU, copy=True)),
        mock.patch.object(Tensor, "pin_memory", lambda x: x),
        mock.patch.object(Tensor, "record_stream"),
    ):
        yield allocated


def images(n: int = 23, side: int = 4) -> Images:
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return Images(pixels, torch.arange(n), torch.arange(n).flip(0), resident=False)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_prefetched_batches_are_the_selected_images(device: torch.device) -> None:
    """Two epochs of two data sets. The last batches are smaller. Two pinned buffers grow, and are reused."""
    prefetcher_of.cache_clear()
    with emulated() as allocated:
        for data in (images(), images(), images(side=6), images()):
            order = torch.randperm(len(data))
            batches = list(data.batches(order, 5, device))
            rows = data.indices[order]
            assert torch.equal(torch.cat([pixels for pixels, _ in batches]), data.images[rows])
            assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels[rows])
            assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert [x.numel() for x in allocated] == ([] if device == CPU else [5 * 48] * 2 + [5 * 108] * 2)
    prefetcher_of.cache_clear()


def test_buffer_is_refilled_only_after_its_copy() -> None:
    with emulated():
        buffer, data = PinnedBuffer(), images()
        buffer.gather(data.images, torch.arange(4), CUDA)
        first = buffer.copied
        assert not first.complete
        buffer.gather(data.images, torch.arange(3), CUDA)
        assert first.complete
        assert buffer.copied is not first


def test_compute_stream_waits_for_the_copy() -> None:
    with emulated():
        prefetcher, data = Prefetcher(CUDA), images()
        prefetcher.ready(prefetcher.fetch(data, torch.arange(3)))
        assert torch.cuda.current_stream(CUDA).waits_for == [prefetcher.stream]
