"""Data loading as in the peers' examples: PIL images in memory, transformed singly in loader processes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class PILImages(Dataset):
    """Images from `pixels` (n, H, W, 3) uint8, converted to PIL on access as in torchvision's CIFAR10."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Image.Image], Any]):
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Any:
        return self.transform(Image.fromarray(self.pixels[number]))


def loader(
    pixels: np.ndarray, transform: Callable[[Image.Image], Any], batch_size: int, workers: int
) -> DataLoader:
    """DataLoader with shuffling; an incomplete last batch is dropped."""
    images = PILImages(pixels, transform)
    return DataLoader(
        images, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )


def forever(loader: DataLoader) -> Iterator[Any]:
    """Yield batches without end, epoch after epoch."""
    while True:
        yield from loader
