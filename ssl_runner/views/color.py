"""Colour augmentations on batches of images in [0, 1], with one parameter per row.

Channels are separate tensors (B, H, W): red, green and blue, or one. All operations but the mean of the
contrast are then pointwise, and torch.compile fuses them. Shape and range are preserved, and each function
equals torchvision's per image. Saturation, hue and grayscale do not apply to one-channel images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_runner.views.sampler import pick

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision


def luma(channels: Sequence[Tensor]) -> Tensor:
    """Return the luma of the channels of images, or the only channel."""
    if len(channels) == 1:
        return channels[0]
    r, g, b = channels
    return (GRAY[0] * r).add(g, alpha=GRAY[1]).add(b, alpha=GRAY[2])


def hue_weights(turns: Tensor) -> Tensor:
    """Return weights (B, 4, 3) with which `mix_channels` shifts the hue by turns (B,), without computing it.

    A shift by a third of the circle is a cyclic permutation of the channels. For the remainder, t sixths of
    the circle with |t| <= 1, let v and m be the largest and the smallest channel of a pixel. Red becomes

        r' = clamp(r - min(1, 1 + 2t) g - min(1, 1 - 2t) b + (1 - |t|) (v + m), m, v)

    and green and blue follow by cyclic permutation. The formula holds on every sixth of the circle, on which
    one channel equals v, one equals m, and the third varies between them.
    """
    thirds = (3 * turns).round()
    t = 6 * turns - 2 * thirds
    t, thirds = t[:, None, None], thirds[:, None, None].long()
    to, of = torch.arange(3, device=turns.device), torch.arange(4, device=turns.device)[:, None]
    distance = (of - to + thirds) % 3
    weights = pick(distance, torch.ones_like(t), -(1 + 2 * t).clamp(max=1), -(1 - 2 * t).clamp(max=1))
    return torch.where(of < 3, weights, 1 - t.abs())


def mix_channels(channels: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Return weighted sums of the channels of each pixel, clamped to the range of its channels.

    channels  red, green and blue, each (B, H, W)
    weights   (B, 4, 3) of red, green, blue and of the sum of the largest and the smallest channel, for each
              of the three output channels
    """
    r, g, b = channels
    high, low = r.maximum(g).maximum(b), r.minimum(g).minimum(b)
    both = high + low
    mixed = []
    for weight in weights[:, :, :, None, None].unbind(2):
        of_r, of_g, of_b, of_both = weight.unbind(1)
        y = (of_both * both).addcmul(of_r, r).addcmul(of_g, g).addcmul(of_b, b)
        mixed.append(y.clamp(low, high))
    return mixed


def blend_weights(factors: Sequence[Tensor], order: Tensor) -> Tensor:
    """Encode brightness, contrast and saturation as the three blend steps of `color_jitter`.

    factors  of brightness, contrast and saturation, each (B,)
    order    (B, 3) permutation of 0, 1, 2: the operation of each step
    returns  (B, 3, 3), for each step: the factor, 1 if it is contrast else 0, 1 if it is saturation else 0
    """
    factor, number = pick(order, *(f[:, None] for f in factors)), torch.arange(3, device=order.device)
    return torch.where(number == 0, factor[:, :, None], (order[:, :, None] == number).float())


def color_jitter(
    channels: Sequence[Tensor], blends: Tensor, hues: Tensor | None, hue_position: Tensor
) -> Sequence[Tensor]:
    """Apply brightness, contrast, saturation and hue to the channels, in a separate order per row.

    channels      each (B, H, W)
    blends        (B, 3, 3) from `blend_weights`
    hues          (B, 4, 3) from `hue_weights`, or None to leave the hue unchanged
    hue_position  (B,) int64: how many of the other operations precede the hue, or 4 for rows that stay
                  unchanged

    Every row goes through the same seven steps: three blends, and the four possible positions of the hue. A
    step that a row does not have has the parameters that leave it unchanged: a factor of 1, or the identity.
    Brightness, contrast and saturation are all a blend with a reference image, so each of the three steps is
    one blend even if the rows apply different operations in it.
    """
    factors = torch.where(hue_position[:, None, None] < 4, blends[:, :, :1], 1.0)
    if hues is not None:
        positions, identity = torch.arange(4, device=hues.device), torch.eye(4, 3, device=hues.device)
        chosen = (hue_position[:, None] == positions)[:, :, None, None]
        mixing = torch.where(chosen, hues[:, None], identity).unbind(1)  # of each step, (B, 4, 3)
    for step in range(4):
        if hues is not None and len(channels) == 3:
            channels = mix_channels(channels, mixing[step])
        if step < 3:
            factor = factors[:, step, :, None]
            contrast, saturation = blends[:, step, 1:, None, None].unbind(1)
            gray = luma(channels)
            reference = (contrast * gray.mean((1, 2), keepdim=True)).addcmul(saturation, gray)
            rest = (1 - factor) * reference
            channels = [rest.addcmul(factor, x).clamp(0, 1) for x in channels]
    return channels


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Replace values x at or above the threshold by 1 - x."""
    return torch.where(x >= threshold, 1 - x, x)
