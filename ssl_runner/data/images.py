"""A subset of the images of a data set, and its batches, prefetched where they are not in device memory."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ssl_runner.data.eval_transform import EvalTransform
from ssl_runner.device import to_device


@dataclass
class Images:
    """A subset of a data set, without a copy of it.

    images (N, C, H, W) uint8 and labels (N,) int64 hold the whole data set; indices (n,) int64 select
    the subset. `resident` is True if the images are in device memory, False if they are in host memory or
    in a memory-mapped file. `transform` is applied to the batches of an evaluation split, None leaves the
    images as they are stored.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    resident: bool
    transform: EvalTransform | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def y(self) -> Tensor:
        """Labels (n,) of this subset, on the device of `labels`."""
        return self.labels[self.indices.to(self.labels.device)]

    @property
    def stored(self) -> "Images":
        """The same images without the evaluation transform, as views are cut from."""
        return replace(self, transform=None)

    def batches(
        self, order: Tensor, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images (b, C, H, W) uint8 and labels (b,) on `device`.

        order (m,) int64 holds positions within this subset, in the order in which they are read. A thread
        prefetches images that are not resident: it gathers and copies one batch ahead of the current step.
        The evaluation transform, if there is one, is computed on `device`.
        """
        for images, labels in self._stored_batches(order, batch_size, device):
            yield (images if self.transform is None else self.transform(images)), labels

    def _stored_batches(
        self, order: Tensor, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if self.resident:
            for indices in to_device(self.indices[order], device).split(batch_size):
                yield self.images[indices], self.labels[indices]
            return
        chunks = self.indices[order].split(batch_size)
        prefetcher = prefetcher_of(device)
        # otherwise the thread would create a context on GPU 0, which takes about 500 MB
        current = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        with ThreadPoolExecutor(1, "prefetch", *current) as thread:
            ahead = thread.submit(prefetcher.fetch, self, chunks[0])
            for following in [*chunks[1:], None]:
                ready = prefetcher.ready(ahead.result())
                if following is not None:
                    ahead = thread.submit(prefetcher.fetch, self, following)
                yield ready


class Prefetcher:
    """Copies batches of images in host memory to a device.

    `fetch` runs in a thread and starts the copy of a batch. `ready` is called before the batch is used. On
    CUDA the copies use a separate stream, so that they overlap with compute, and two pinned buffers in turn.
    Several iterators may share a prefetcher.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers, self.lock = (PinnedBuffer(), PinnedBuffer()), threading.Lock()

    def fetch(self, images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Start copying the images at indices (b,) to the device. Returns the copies and their labels."""
        if self.stream is None:
            return images.images[indices].to(self.device), images.labels[indices.to(self.device)]
        with self.lock, torch.cuda.stream(self.stream):
            self.buffers = self.buffers[::-1]
            batch = self.buffers[0].gather(images.images, indices, self.device)
            return batch, images.labels[to_device(indices, self.device)]

    def ready(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the compute stream wait for the copy of `batch`, without a host-device sync."""
        if self.stream is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.stream)
            for tensor in batch:
                tensor.record_stream(compute)
        return batch


class PinnedBuffer:
    """Pinned memory through which one batch at a time is copied to a CUDA device. It grows with the batch."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied: torch.cuda.Event | None = None

    def gather(self, images: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        """Start copying images[indices] (b, C, H, W) uint8 to the device, in the current stream.

        First waits until the previous batch has left the buffer.
        """
        if self.copied is not None:
            self.copied.synchronize()
        shape = (len(indices), *images.shape[1:])
        if self.memory.numel() < math.prod(shape):
            self.memory = torch.empty(math.prod(shape), dtype=torch.uint8, pin_memory=True)
        batch = self.memory[: math.prod(shape)].view(shape)
        torch.index_select(images, 0, indices, out=batch)
        batch = batch.to(device, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(device))
        return batch


@cache
def prefetcher_of(device: torch.device) -> Prefetcher:
    """The prefetcher of a device in this process."""
    return Prefetcher(device)
