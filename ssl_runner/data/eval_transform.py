"""The evaluation transform: Resize and CenterCrop of the images that probes and baselines are computed on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import center_crop


@dataclass(frozen=True)
class EvalTransform:
    """torchvision's `Resize(resize)` of the shorter side, then `CenterCrop(crop)`. None leaves a step out.

    The resize is bicubic and antialiased. As in Pillow, pixels are rounded after the horizontal and after the
    vertical pass. The passes are computed in float32, so devices agree except for ties, and few pixels differ
    from Pillow's.
    """

    resize: int | None = None
    crop: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) uint8 -> (n, C, S, S) uint8 on the same device, with S the size of the crop."""
        height, width = images.shape[2:]
        shorter = min(height, width)
        if self.resize is not None and shorter != self.resize:
            new_height, new_width = (side * self.resize // shorter for side in (height, width))
            # MPS has no antialiased bicubic interpolation before torch 2.8
            x = (images.cpu() if images.device.type == "mps" else images).float()
            for size in ((height, new_width), (new_height, new_width)):
                x = interpolate(x, size, mode="bicubic", antialias=True).add_(0.5).floor_().clamp_(0, 255)
            images = x.to(torch.uint8).to(images.device)
        return images if self.crop is None else center_crop(images, [self.crop, self.crop])

    def side(self, stored: int) -> int:
        """The side in pixels of square images of `stored` pixels per side after the transform."""
        return self.crop or self.resize or stored
