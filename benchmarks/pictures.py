"""Images as the peers load them: PIL images out of memory, transformed one by one in loader processes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    """pixels (n, H, W, 3) uint8, given as torchvision's CIFAR10 gives its images."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Image.Image], Any]):
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Any:
        return self.transform(Image.fromarray(self.pixels[number]))


def loader(
    pixels: np.ndarray, transform: Callable[[Image.Image], Any], batch_size: int, workers: int
) -> DataLoader:
    """Shuffled, whole batches."""
    images = Pictures(pixels, transform)
    return DataLoader(
        images, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )


def forever(loader: DataLoader) -> Iterator[Any]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader
