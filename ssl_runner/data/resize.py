"""Resize all images of a data set, and convert them to one or three channels, in blocks of bounded memory."""

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_runner.data.dataset import Source

BLOCK = 1000  # images converted at once
LUMA = (19595, 38470, 7471)  # ITU-R 601 weights of red, green and blue, times 2^16, as in Pillow


def resized(data: Source, size: int | None, channels: int | None) -> Source:
    """Return a data set with images (n, channels, size, size) uint8. None keeps the size or channels.

    The shorter side is resized to `size` pixels (bicubic, antialiased), then the centre is cropped to a
    square: torchvision's `Resize(size)` and `CenterCrop(size)`. Three channels become one by ITU-R 601 luma,
    as in Pillow's convert("L"). One channel becomes three by repetition. Besides the result, only a block of
    1,000 images is in memory.

    Raises ValueError if the images have neither one nor three channels and `channels` differs.
    """
    images = data.images
    if (size is None or tuple(images.shape[2:]) == (size, size)) and channels in (None, images.shape[1]):
        return data
    blocks = (_convert(block, size, channels) for block in images.split(BLOCK))
    first = next(blocks)
    result = first.new_empty(len(images), *first.shape[1:])
    result[: len(first)] = first
    for number, block in enumerate(blocks, start=1):
        result[number * BLOCK : number * BLOCK + len(block)] = block
    resized = size is not None and tuple(images.shape[2:]) != (size, size)
    return replace(data, images=result, mapped=False, tensor_resize=resized)


def _convert(images: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Images (b, C, H, W) uint8 -> (b, channels, size, size) uint8."""
    if channels == 1 and images.shape[1] != 1:
        images = luma(images)
    if size is not None:
        images = resize(images, size)
    if channels == 3 and images.shape[1] != 3:
        if images.shape[1] != 1:
            raise ValueError(f"dataset.channels=3: expected images of 1 or 3 channels, not {images.shape[1]}")
        images = images.expand(-1, 3, -1, -1)
    return images


def resize(images: Tensor, size: int) -> Tensor:
    """Images (b, C, H, W) uint8 -> (b, C, size, size) uint8, by `Resize(size)` and `CenterCrop(size)`.

    torchvision rounds the weights of the filter to other numbers than Pillow does, so a few pixels differ
    from Pillow's, most of these by one grey level.
    """
    images = F.resize(images, [size], InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(images, [size, size])


def luma(images: Tensor) -> Tensor:
    """RGB images (b, 3, H, W) uint8 -> their luma (b, 1, H, W) uint8, equal to Pillow's convert("L")."""
    if images.shape[1] != 3:
        raise ValueError(f"dataset.channels=1: expected images of 1 or 3 channels, not {images.shape[1]}")
    weights = torch.tensor(LUMA, dtype=torch.int32, device=images.device).view(3, 1, 1)
    return (((images * weights).sum(1, keepdim=True) + 0x8000) >> 16).to(torch.uint8)
