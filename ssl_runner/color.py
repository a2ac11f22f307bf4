"""Colour: x (B, C, H, W) in [0, 1] and one parameter a row -> the same shape in [0, 1], as torchvision's on one image.

C is 3, or 1 where saturation, hue and the loss of colour leave an image as it is.
"""

import torch
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision


def column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to act on images."""
    return v[:, None, None, None]


def luma(x: Tensor) -> Tensor:
    """x (B, 3, H, W) -> (B, 1, H, W); one-channel images are their own luma."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (GRAY[0] * r).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])


def blend(x: Tensor, reference: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """factor x + (1 - factor) reference, clamped to [0, 1]; reference (B, 1, H, W), factor (B,)."""
    return torch.lerp(reference, x, column(factor), out=out).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, torch.zeros_like(x[:, :1]), factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x), factor)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, 3, H, W), turns (B,) in [-0.5, 0.5] of the colour circle: greatest and least value of a pixel stay, its hue turns.

    A third of a turn is a change of places of the channels. What is left, t sixths with |t| <= 1, needs no hue: with v and m a
    pixel's greatest and least value, the red one becomes, and the others likewise around the circle,

        r' = clamp(r - min(1, 1 + 2t) g - min(1, 1 - 2t) b + (1 - |t|) (v + m), m, v)

    which holds on each sixth of the circle, where one channel is v, one is m, and the third moves between them.
    """
    thirds = (3 * turns).round()
    t = 6 * turns - 2 * thirds
    weights = torch.stack([torch.ones_like(t), -(1 + 2 * t).clamp(max=1), -(1 - 2 * t).clamp(max=1)], 1)
    channel = torch.arange(3, device=x.device)
    places = (channel - channel[:, None] + thirds[:, None, None].long()) % 3  # of (B, output, input) among the weights
    M = weights.gather(1, places.flatten(1)).view(-1, 3, 3, 1, 1)
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    y = M[:, :, 0] * x[:, :1]
    for c in (1, 2):
        y += M[:, :, c] * x[:, c : c + 1]
    y += (value + least).mul_(column(1 - t.abs()))
    return torch.clamp(y, least, value)


def color_jitter(x: Tensor, factors: Tensor, order: Tensor, turns: Tensor | None, place: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in a row's own order; changes x in place and returns it.

    factors (B, 3) of brightness, contrast and saturation, order (B, 3) of these three, turns (B,) of the hue, and place (B,)
    on the host, ascending: how many of the three come before the hue, or 4 for a row that stays as it is. The three are one
    blend with a row's own reference, so that all rows take them together, whatever their order.
    """
    *starts, end = torch.searchsorted(place, torch.arange(5)).tolist()
    jittered, factors, order = x[:end], factors[:end].gather(1, order[:end]), order[:end]
    contrast, saturation = (order == 1).float(), (order == 2).float()
    for step, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True)):
        if turns is not None and start < stop:
            x[start:stop] = adjust_hue(x[start:stop], turns[start:stop])
        if step < 3 and end:
            gray = luma(jittered)
            mean = gray.mean((1, 2, 3), keepdim=True)
            reference = (gray * column(saturation[:, step])).add_(mean.mul_(column(contrast[:, step])))
            blend(jittered, reference, factors[:, step], out=jittered)
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Values at or above the threshold are inverted."""
    return torch.lerp(x, 1 - x, (x >= threshold).float())  # exact at both ends, and far faster than torch.where on a CPU
