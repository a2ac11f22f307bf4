"""Colour: x (B, C, H, W) in [0, 1] and one parameter a row -> the same shape in [0, 1], as torchvision's on one image.

C is 3, or 1 where saturation, hue and the loss of colour leave an image as it is.
"""

from itertools import pairwise

import torch
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision


def column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to act on images."""
    return v.view(-1, 1, 1, 1)


def luma(x: Tensor) -> Tensor:
    """x (B, 3, H, W) -> (B, 1, H, W); one-channel images are their own luma."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (GRAY[0] * r).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])


def blend(x: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) reference, clamped to [0, 1]; reference (B, 1, H, W), factor (B,)."""
    return torch.lerp(reference, x, column(factor)).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, torch.zeros_like(x[:, :1]), factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x), factor)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, 3, H, W), turns (B,) in [-0.5, 0.5] of the colour circle: greatest and least value of a pixel stay, its hue turns."""
    return mix_channels(x, hue_weights(turns))


def hue_weights(turns: Tensor) -> Tensor:
    """turns (B,) -> weights (B, 4, 3) with which `mix_channels` turns the hue, without ever computing it.

    A third of a turn is a change of places of the channels. For what is left, t sixths with |t| <= 1, let v and m be a pixel's
    greatest and least value; red becomes, and the others likewise around the circle,

        r' = clamp(r - min(1, 1 + 2t) g - min(1, 1 - 2t) b + (1 - |t|) (v + m), m, v)

    which holds on each sixth of the circle, where one channel is v, one is m, and the third moves between them.
    """
    thirds = (3 * turns).round()
    t = 6 * turns - 2 * thirds
    weights = torch.stack([torch.ones_like(t), -(1 + 2 * t).clamp(max=1), -(1 - 2 * t).clamp(max=1)], 1)
    channel = torch.arange(3, device=turns.device)
    places = (
        channel[:, None] - channel + thirds[:, None, None].long()
    ) % 3  # of (B, input, output) among the weights
    return torch.cat([weights.gather(1, places.flatten(1)), (1 - t.abs())[:, None].expand(-1, 3)], 1).view(
        -1, 4, 3
    )


def mix_channels(x: Tensor, weights: Tensor) -> Tensor:
    """x (B, 3, H, W), weights (B, 4, 3) -> weighted sums of a pixel's channels and of its greatest plus its least value, clamped
    between these two."""
    (r, g, b), (of_r, of_g, of_b, of_sum) = x.split(1, 1), weights[:, :, :, None, None].unbind(1)
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    y = (of_sum * (value + least)).addcmul_(of_r, r).addcmul_(of_g, g).addcmul_(of_b, b)
    return y.clamp_(least, value)


def blend_weights(factors: Tensor, order: Tensor) -> Tensor:
    """factors (B, 3) of brightness, contrast and saturation, and the order (B, 3) of these three -> for each step what
    `color_jitter` needs of it, (B, 3, 3): the factor, and 1 in the next place for contrast, in the last for saturation."""
    return torch.stack([factors.gather(1, order), (order == 1).float(), (order == 2).float()], 2)


def color_jitter(x: Tensor, blends: Tensor, hues: Tensor | None, place: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in a row's own order; changes x in place and returns it.

    blends (B, 3, 3) of `blend_weights`, hues (B, 4, 3) of `hue_weights`, and place (B,) on the host, ascending: how many of the
    other three come before the hue, or 4 for a row that stays as it is. The three are one blend with a row's own reference, so
    that all rows take them together, whatever their order.
    """
    *starts, end = torch.searchsorted(place, torch.arange(5)).tolist()
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
    """Values at or above the threshold are inverted."""
    inverted = torch.ge(
        x, threshold, out=torch.empty_like(x)
    )  # 0 or 1: on a CPU far faster than a bool and torch.where
    return torch.lerp(x, 1 - x, inverted)
