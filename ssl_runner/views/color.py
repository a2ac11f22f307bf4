"""Colour augmentations on batches x (B, C, H, W) in [0, 1], with one parameter per row.

Shape and range are preserved, and each function equals torchvision's per image. C is 3 or 1; saturation, hue
and grayscale do not apply to one-channel images.
"""

from itertools import pairwise

import torch
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision


def luma(x: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W) of x (B, 3, H, W). One-channel images are returned unchanged."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (GRAY[0] * r).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])


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
    weights = torch.stack([torch.ones_like(t), -(1 + 2 * t).clamp(max=1), -(1 - 2 * t).clamp(max=1)], 1)
    channel = torch.arange(3, device=turns.device)
    index = (channel[:, None] - channel + thirds[:, None, None].long()) % 3  # (B, input, output) -> weight
    mixing = weights.gather(1, index.flatten(1))
    return torch.cat([mixing, (1 - t.abs())[:, None].expand(-1, 3)], 1).view(-1, 4, 3)


def mix_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of the channels of each pixel, clamped to the range of its channels.

    x (B, 3, H, W); weights (B, 4, 3) of red, green, blue and of the sum of the largest and the smallest
    channel, for each of the three output channels.
    """
    r, g, b = x.split(1, 1)
    weights_r, weights_g, weights_b, weights_sum = weights[:, :, :, None, None].unbind(1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    y = (weights_sum * (high + low)).addcmul_(weights_r, r).addcmul_(weights_g, g).addcmul_(weights_b, b)
    return y.clamp_(low, high)


def blend_weights(factors: Tensor, order: Tensor) -> Tensor:
    """Encode brightness, contrast and saturation as the three blend steps of `color_jitter`.

    factors  (B, 3) of brightness, contrast and saturation
    order    (B, 3) permutation of 0, 1, 2: the operation of each step
    returns  (B, 3, 3), for each step: the factor, 1 if it is contrast else 0, 1 if it is saturation else 0
    """
    return torch.stack([factors.gather(1, order), (order == 1).float(), (order == 2).float()], 2)


def color_jitter(x: Tensor, blends: Tensor, hues: Tensor | None, hue_position: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue to x (B, C, H, W) in place, in a separate order per row.

    blends        (B, 3, 3) from `blend_weights`
    hues          (B, 4, 3) from `hue_weights`, or None to leave the hue unchanged
    hue_position  (B,) int64 on the host, ascending: how many of the other operations precede the hue, or 4
                  for rows that stay unchanged
    returns       x

    Brightness, contrast and saturation are all a blend with a reference image, so each of the three steps is
    one batched blend even if the rows apply different operations in it.
    """
    *starts, end = torch.searchsorted(hue_position, torch.arange(5)).tolist()
    jittered, steps = x[:end], blends[:end, :, :, None, None, None].unbind(1)
    for step, (start, stop) in enumerate(pairwise([*starts, end])):
        if hues is not None and start < stop:
            x[start:stop] = mix_channels(x[start:stop], hues[start:stop])
        if step < 3 and end:
            factor, contrast, saturation = steps[step].unbind(1)
            gray = luma(jittered)
            reference = (gray * saturation).add_(gray.mean((1, 2, 3), keepdim=True).mul_(contrast))
            torch.lerp(reference, jittered, factor, out=jittered).clamp_(0, 1)
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Replace values x at or above the threshold by 1 - x."""
    # a float mask of 0 and 1 with lerp is much faster on a CPU than a bool mask with torch.where
    inverted = torch.ge(x, threshold, out=torch.empty_like(x))
    return torch.lerp(x, 1 - x, inverted)
