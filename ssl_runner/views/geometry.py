"""Geometric augmentations and blur on batches; each equals torchvision's on one image.

All but affine maps are separable weighted sums of a few rows, then of a few columns. A crop reads 2 rows per
output row (more if it downscales), a blur as many as the side of its kernel.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.device import to_device
from ssl_runner.views.sampler import ParamSampler


def random_boxes(
    sampler: ParamSampler,
    height: int,
    width: int,
    scale: Sequence[float],
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Sample crop boxes (B, 4) as torchvision's RandomResizedCrop does: top, left, height, width, integers.

    The fraction of the image area is uniform in `scale`, the aspect ratio width / height is log-uniform in
    `ratio`. The first of ten tries that fits into the image is used, or the whole image if none fits.
    """
    tries = 10

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * sampler.random(before=(tries,))

    area = height * width * uniform(*scale)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    w = torch.where(found, w.gather(0, first)[0], width)
    h = torch.where(found, h.gather(0, first)[0], height)
    top, left = ((size + 1 - side) * sampler.uniform(0, 1) for size, side in ((height, h), (width, w)))
    return torch.stack([top.floor(), left.floor(), h, w], 1)


def full_boxes(rows: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the box of the whole image, repeated for every row: (rows, 4)."""
    return to_device(torch.tensor([0.0, 0.0, height, width]), device).expand(rows, 4)


def random_affines(
    sampler: ParamSampler,
    height: int,
    width: int,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: Sequence[float] = (1.0, 1.0),
    shear: float = 0.0,
) -> Tensor:
    """Sample inverse affine matrices (B, 2, 3), with all parameters uniform.

    The angle is in [-degrees, degrees], the shift in [-translate, translate] times the side of the image and
    rounded to whole pixels, the zoom factor in `scale`, the shear along x in [-shear, shear] degrees.
    """
    return affine_matrices(
        sampler.uniform(-degrees, degrees),
        (sampler.uniform(-translate, translate) * width).round(),
        (sampler.uniform(-translate, translate) * height).round(),
        sampler.uniform(*scale),
        sampler.uniform(-shear, shear),
    )


def affine_matrices(angle: Tensor, right: Tensor, down: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Return matrices (B, 2, 3) that map output pixels to input pixels, relative to the image centre.

    angle and shear (along x) in degrees, right and down in pixels, scale, each (B,). The result is the
    inverse of torchvision's map x -> shift + scale R(angle) Shear(shear) x.
    """
    angle, shear = angle.deg2rad(), shear.deg2rad()
    a, b = angle.cos(), -(angle.cos() * shear.tan() + angle.sin())
    c, d = angle.sin(), -(angle.sin() * shear.tan() - angle.cos())
    # the matrix [[a, b], [c, d]] has determinant 1
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / scale[:, None, None]
    shift = -inverse @ torch.stack([right, down], 1)[:, :, None]
    return torch.cat([inverse, shift], 2)


def resample(
    x: Tensor,
    boxes: Tensor | None = None,
    flip: Tensor | None = None,
    matrices: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Apply crop, flip, affine map and resize in a single resampling.

    Output pixels are mapped to input pixels: flipped, then scaled into the box, then mapped by the matrix.

    x         (B, C, H, W)
    boxes     (B, 4) top, left, height, width in pixels of x, by default the whole image
    flip      (B,) bool, True for a horizontal flip
    matrices  (B, 2, 3) as from `affine_matrices`
    size      (height, width) of the result, by default (H, W)
    returns   (B, C, height, width)

    Without matrices the result equals torchvision's resized_crop with antialias, and pixels outside the box
    are not read. With matrices, pixels outside the image are black, and x is first resized to `size`.
    """
    B, _, H, W = x.shape
    size = size or (H, W)
    if boxes is None:
        boxes = full_boxes(B, H, W, x.device)
    if matrices is None:
        return sum_both(x, *box_sums(boxes, flip, (H, W), size))
    small = x if size == (H, W) else resample(x, size=size)
    # centres of the output pixels, in pixels of x
    down = torch.arange(0.5, size[0], device=x.device).mul(H / size[0]).expand(B, -1)
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
    boxes: Tensor, flip: Tensor | None, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the indices and weights of the separable resampling from boxes to `size`.

    boxes    (B, 4) within images of `image_size`, (height, width)
    flip     (B,) bool, or None
    returns  input rows of each output row and their weights, both (B, height, K), then input columns of each
             output column and their weights, both (B, width, K')
    """
    top, left, h, w = boxes.unbind(1)
    rows = triangle_filter(top, h, image_size[0], size[0])
    columns = triangle_filter(left, w, image_size[1], size[1], flip)
    return *rows, *columns


def triangle_filter(
    first: Tensor, length: Tensor, side: int, out: int, flip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `box_sums` along one axis, with a triangle filter truncated at the box.

    first, length (B,) are the start and length of the box on an axis of `side` pixels, resized to `out`. The
    half-width of the filter is one input pixel or one output pixel, whichever is larger. Returns int64
    indices and weights, both (B, out, K).
    """
    step = (length / out)[:, None]
    # centres of the output pixels, in pixels from `first`
    centre = step * torch.arange(0.5, out, device=first.device)
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
    """Return weighted sums of rows of x (B, C, H, W), then of columns of the result: (B, C, h, w).

    rows and row_weights (B, h, K); columns and column_weights (B, w, K').
    """
    return sum_rows(sum_rows(x, rows, row_weights).mT, columns, column_weights).mT.contiguous()


def sum_rows(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return sum_k weights_ik x[rows_ik], (B, C, h, W), for x (B, C, H, W), rows and weights (B, h, K)."""
    B, C, H, W = x.shape
    h, K = rows.shape[1:]
    starts = torch.arange(0, B * C * H, H, device=x.device).view(B, C, 1, 1)
    bags, weights = (rows[:, None] + starts).view(-1, K), weights[:, None].expand(B, C, h, K).reshape(-1, K)
    return F.embedding_bag(bags, x.reshape(-1, W), mode="sum", per_sample_weights=weights).view(B, C, h, W)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur x (B, C, H, W) with a Gaussian of standard deviation sigma (B,) in pixels. Edges are mirrored.

    `kernel` is the side of the kernel: odd, and less than twice the side of the image.
    """
    offsets = torch.arange(kernel, device=x.device) - kernel // 2
    weights = (-(offsets**2) / (2 * sigma[:, None] ** 2)).exp()
    weights = (weights / weights.sum(1, keepdim=True))[:, None]
    sums = []
    for side in x.shape[-2:]:
        pixels = torch.arange(side, device=x.device)[:, None] + offsets
        pixels = side - 1 - (side - 1 - pixels.abs()).abs()  # mirror at both ends
        sums += [pixels.expand(len(x), side, kernel), weights.expand(len(x), side, kernel)]
    return sum_both(x, *sums)
