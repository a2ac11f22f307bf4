"""Geometric augmentations and blur on batches; each equals torchvision's on one image.

All but affine maps are separable weighted sums of a few columns, then of a few rows. Their number depends on
the sizes of images and views only, so that all shapes are static. A crop reads 2 columns per output column,
or 2 W / w if views are w < W pixels wide; a blur as many as the side of its kernel.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.views.sampler import ParamSampler, pick


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
    found = fits.gather(0, first)[0]
    w = torch.where(found, w.gather(0, first)[0], width)
    h = torch.where(found, h.gather(0, first)[0], height)
    top, left = ((size + 1 - side) * sampler.uniform(0, 1) for size, side in ((height, h), (width, w)))
    edges = torch.arange(4, device=sampler.device)
    return pick(edges, *(values[:, None] for values in (top.floor(), left.floor(), h, w)))


def full_boxes(rows: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the box of the whole image, repeated for every row: (rows, 4)."""
    sides = [torch.full((rows,), float(side), device=device) for side in (0, 0, height, width)]
    return torch.stack(sides, 1)


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

    x         (B, C, H, W), float in [0, 1] or uint8
    boxes     (B, 4) top, left, height, width in pixels of x, by default the whole image
    flip      (B,) bool, True for a horizontal flip
    matrices  (B, 2, 3) as from `affine_matrices`
    size      (height, width) of the result, by default (H, W)
    returns   (B, C, height, width) float in [0, 1]

    Without matrices the result equals torchvision's resized_crop with antialias, and pixels outside the box
    are not read. With matrices, pixels outside the image are black, and x is first resized to `size`.
    """
    B, _, H, W = x.shape
    size = size or (H, W)
    if boxes is None:
        boxes = full_boxes(B, H, W, x.device)
    if matrices is None:
        return sum_both(x, *box_sums(boxes, flip, (H, W), size))
    small = to_unit(x) if size == (H, W) else resample(x, size=size)
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
    """Return weighted sums of columns of x (B, C, H, W), then of rows of the result: (B, C, h, w).

    x is float, or uint8 and divided by 255. rows and row_weights (B, h, K); columns and column_weights
    (B, w, K'). The result is channels-last in memory.
    """
    if x.dtype == torch.uint8:
        column_weights = column_weights / 255
    across = sum_columns(x, columns, column_weights)  # (B, w, C, H)
    return sum_columns(across, rows, row_weights).permute(0, 3, 1, 2)


def sum_columns(x: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Return sum_k weights_jk x[..., columns_jk], (B, w, C, H), for x (B, C, H, W), both others (B, w, K)."""
    b = torch.arange(len(x), device=x.device)[:, None]
    terms = (
        x[b, :, :, column] * weight[:, :, None, None]
        for column, weight in zip(columns.unbind(2), weights.unbind(2), strict=True)
    )
    return sum(terms, next(terms))


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int, chosen: Tensor | None = None) -> Tensor:
    """Blur x (B, C, H, W) with a Gaussian of standard deviation sigma (B,) in pixels. Edges are mirrored.

    `kernel` is the side of the kernel: odd, and less than twice the side of the image. Rows that are not
    `chosen` (B,) are returned unchanged; by default all are blurred.
    """
    half = kernel // 2
    offsets = torch.arange(half + 1, device=x.device)
    weights = (-(offsets**2) / (2 * sigma[:, None] ** 2)).exp()
    weights = weights / (2 * weights.sum(1, keepdim=True) - 1)  # all but the first occur twice
    if chosen is not None:
        weights = torch.where(chosen[:, None], weights, (offsets == 0).float())
    weights = weights[:, :, None, None, None]
    for axis, padding in ((2, (0, 0, half, half)), (3, (half, half, 0, 0))):
        side, padded = x.shape[axis], F.pad(x, padding, mode="reflect")
        x = weights[:, 0] * x
        for t in range(1, half + 1):
            before, after = (padded.narrow(axis, half + offset, side) for offset in (-t, t))
            x = x.addcmul(weights[:, t], before + after)
    return x


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]. Float images are returned unchanged."""
    return images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images
