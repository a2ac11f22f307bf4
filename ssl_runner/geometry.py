"""What moves pixels and what mixes neighbours: crops, flips, affine maps, changes of size, blur. As torchvision's on one image.

All but the affine maps are sums of few rows, then of few columns: a crop reads two (more where it shrinks), a blur its kernel's.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.draw import Draw
from ssl_runner.relation import copied


def random_boxes(
    draw: Draw, height: int, width: int, scale: Sequence[float], ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> Tensor:
    """Boxes (B, 4) of whole pixels: top, left, height, width, drawn as torchvision's RandomResizedCrop draws them: a share of
    the area uniform in `scale`, width to height log-uniform in `ratio`; of ten tries the first that fits, else the whole image.
    """
    tries = 10

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * draw.random(before=(tries,))

    area = height * width * uniform(*scale)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    w = torch.where(found, w.gather(0, first)[0], width)
    h = torch.where(found, h.gather(0, first)[0], height)
    top, left = ((size + 1 - side) * draw.uniform(0, 1) for size, side in ((height, h), (width, w)))
    return torch.stack([top.floor(), left.floor(), h, w], 1)


def whole(rows: int, height: int, width: int, device: torch.device) -> Tensor:
    """The box of an uncropped image, for each of some rows: (rows, 4)."""
    return copied(torch.tensor([0.0, 0.0, height, width]), device).expand(rows, 4)


def random_affines(
    draw: Draw,
    height: int,
    width: int,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: Sequence[float] = (1.0, 1.0),
    shear: float = 0.0,
) -> Tensor:
    """Inverse affine matrices (B, 2, 3): an angle in +-`degrees`, a shift by whole pixels of up to the share `translate` of the
    side, a factor in `scale`, a shear along x in +-`shear` degrees."""
    return affine_matrices(
        draw.uniform(-degrees, degrees),
        (draw.uniform(-translate, translate) * width).round(),
        (draw.uniform(-translate, translate) * height).round(),
        draw.uniform(*scale),
        draw.uniform(-shear, shear),
    )


def affine_matrices(angle: Tensor, right: Tensor, down: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Angle and x-shear in degrees, shift in pixels, scale, each (B,) -> (B, 2, 3): output to input pixel, about the centre.

    The inverse of torchvision's RSS: x -> shift + scale R(angle) Shear(shear) x.
    """
    angle, shear = angle.deg2rad(), shear.deg2rad()
    a, b = angle.cos(), -(angle.cos() * shear.tan() + angle.sin())
    c, d = angle.sin(), -(angle.sin() * shear.tan() - angle.cos())
    inverse = (
        torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / scale[:, None, None]
    )  # the determinant of a, b, c, d is 1
    shift = -inverse @ torch.stack([right, down], 1)[:, :, None]
    return torch.cat([inverse, shift], 2)


def resample(
    x: Tensor,
    boxes: Tensor | None = None,
    flip: Tensor | None = None,
    matrices: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """One look-up for crop, flip, affine and size: output pixel -> flipped -> inside the box -> through the matrix -> input.

    x (B, C, H, W); boxes (B, 4) top, left, height, width; flip (B,) bool; matrices (B, 2, 3) about the image's centre; size of
    the result, by default (H, W). A crop is torchvision's resized_crop with antialias, and reads nothing outside its box. An
    affine reads black outside the image, and where the size changes looks up in the image at that size.
    """
    B, _, H, W = x.shape
    size = size or (H, W)
    if boxes is None:
        boxes = whole(B, H, W, x.device)
    if matrices is None:
        return sum_both(x, *box_sums(boxes, flip, (H, W), size))
    small = x if size == (H, W) else resample(x, size=size)
    down = (
        torch.arange(0.5, size[0], device=x.device).mul(H / size[0]).expand(B, -1)
    )  # pixel centres, in pixels of x
    right = torch.arange(0.5, size[1], device=x.device).mul(W / size[1]).expand(B, -1)
    if flip is not None:
        right = torch.where(flip[:, None], W - right, right)
    top, left, h, w = boxes[:, :, None].unbind(1)
    down, right = down * (h / H) + top - H / 2, right * (w / W) + left - W / 2
    m = matrices[:, :, :, None, None]
    across, along = (
        m[:, r, 0] * right[:, None, :] + m[:, r, 1] * down[:, :, None] + m[:, r, 2] for r in (0, 1)
    )
    grid = torch.stack([across / (W / 2), along / (H / 2)], -1)
    return F.grid_sample(small, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def box_sums(
    boxes: Tensor, flip: Tensor | None, own: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows of an image of size `own` each row of its resized box consists of, with what weights, and which columns each
    column: boxes (B, 4), flip (B,) -> (B, height, K), (B, height, K), (B, width, K'), (B, width, K')."""
    top, left, h, w = boxes.unbind(1)
    return *hats(top, h, own[0], size[0]), *hats(left, w, own[1], size[1], flip)


def hats(
    first: Tensor, length: Tensor, side: int, out: int, flip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`box_sums` along one axis: a hat of half-width one input pixel, or one output pixel if that is more, cut off at the box."""
    step = (length / out)[:, None]
    centre = step * torch.arange(0.5, out, device=first.device)  # of the output pixels, in the box
    if flip is not None:
        centre = torch.where(flip[:, None], length[:, None] - centre, centre)
    reach, centre, last = step.clamp(min=1)[:, :, None], centre[:, :, None], length[:, None, None] - 1
    pixels = (centre - reach + 0.5).floor() + torch.arange(
        max(2, math.ceil(2 * side / out)), device=first.device
    )
    inside = pixels.clamp(min=0).minimum(last)
    weights = (1 - (pixels + 0.5 - centre).abs_().div_(reach)).relu_().mul_(inside == pixels)
    return inside.add_(first[:, None, None]).long(), weights.div_(weights.sum(2, keepdim=True))


def sum_both(x: Tensor, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor) -> Tensor:
    """x (B, C, H, W) -> weighted sums of its rows, (B, h, K), and of their columns, (B, w, K'): (B, C, h, w)."""
    return sum_rows(sum_rows(x, rows, row_weights).mT, columns, column_weights).mT.contiguous()


def sum_rows(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """x (B, C, H, W), rows of it and their weights (B, h, K) -> sum_k weights_ik x[rows_ik]: (B, C, h, W)."""
    B, C, H, W = x.shape
    h, K = rows.shape[1:]
    starts = torch.arange(0, B * C * H, H, device=x.device).view(B, C, 1, 1)
    bags, weights = (rows[:, None] + starts).view(-1, K), weights[:, None].expand(B, C, h, K).reshape(-1, K)
    return F.embedding_bag(bags, x.reshape(-1, W), mode="sum", per_sample_weights=weights).view(B, C, h, W)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """x (B, C, H, W), sigma (B,) in pixels, an odd kernel side of less than twice the image's; mirrored edges."""
    offsets = torch.arange(kernel, device=x.device) - kernel // 2
    weights = (-(offsets**2) / (2 * sigma[:, None] ** 2)).exp()
    weights = (weights / weights.sum(1, keepdim=True))[:, None]
    sums = []
    for side in x.shape[-2:]:
        pixels = torch.arange(side, device=x.device)[:, None] + offsets
        pixels = side - 1 - (side - 1 - pixels.abs()).abs()  # mirrored at both ends
        sums += [pixels.expand(len(x), side, kernel), weights.expand(len(x), side, kernel)]
    return sum_both(x, *sums)
