"""A subset of the images of a data set, and its batches, prefetched where they are not in device memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

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
        prefetcher = Prefetcher(device)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(prefetcher.fetch, self, chunks[0])
            for following in [*chunks[1:], None]:
                ready = prefetcher.ready(ahead.result())
                if following is not None:
                    ahead = thread.submit(prefetcher.fetch, self, following)
                yield ready


class Prefetcher:
    """Copies batches of images in host memory to a device.

    `fetch` runs in a thread and starts the copy of a batch. `ready` is called before the batch is used. On
    CUDA the copy uses pinned memory and a separate stream, so that it overlaps with compute.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Start copying the images at indices (b,) to the device. Returns the copies and their labels."""
        batch = images.images[indices]
        if self.stream is None:
            return batch.to(self.device), images.labels[indices.to(self.device)]
        with torch.cuda.stream(self.stream):
            batch, indices = to_device(batch, self.device), to_device(indices, self.device)
            return batch, images.labels[indices]

    def ready(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the compute stream wait for the copy of `batch`, without a host-device sync."""
        if self.stream is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.stream)
            for tensor in batch:
                tensor.record_stream(compute)
        return batch
