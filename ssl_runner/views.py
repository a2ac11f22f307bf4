"""Batched augmentation: uint8 originals (n, C, H, W) -> X (V n, C, H, W), view-major, with fresh randomness for every row.

Every operation is a pure tensor function on the device of its input, takes one parameter a row, and agrees with
torchvision.transforms.functional on one image with the same parameters. Images are float in [0, 1] until normalised, last.
"""

import math
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from ssl_runner.dataset import DataSet
from ssl_runner.relation import copied

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision


class Augment:
    """`policies` names the ways in which a view is made, each the settings of a `Policy`; view v is made by the policy number
    v mod len(policies), so one policy serves any V. Raises ValueError for settings that make no sense."""

    def __init__(self, policies: Mapping[str, Mapping[str, Any]]):
        if not policies:
            raise ValueError("views.policies is empty: name at least one policy, such as {all: {flip: 0.5}}")
        self.policies = []
        for name, settings in policies.items():
            try:
                self.policies.append(Policy(**settings))
            except (TypeError, ValueError) as error:
                raise ValueError(f"views.policies.{name}: {error}") from error

    def __call__(
        self, images: Tensor, V: int, mean: Tensor, std: Tensor, generator: torch.Generator, part: int = 0, parts: int = 1
    ) -> Tensor:
        """images (n, C, H, W) uint8 -> V views of each, normalised: (V n, C, H, W) float32, row v n + k a view of image k.

        Where the images are one of several equal parts of a batch, their views are those that they have in the whole batch: all
        random numbers are drawn for all rows, and the images' own are used.
        """
        n, device = len(images), images.device
        X = torch.empty(V, *images.shape, device=device)
        for which, policy in enumerate(self.policies[:V]):
            views = X[which :: len(self.policies)]
            draw = Draw(len(views) * n * parts, device, generator)
            order = draw.shuffled()
            view, image = order // (n * parts), order % (n * parts)
            if parts > 1:
                draw.choose((image // n == part).nonzero()[:, 0])
                view, image = view[draw.places], image[draw.places] - part * n
            view, image = copied(view, device), copied(image, device)
            views[view, image] = normalize(policy(to_unit(images[image]), draw), mean, std)
        return X.flatten(0, 1)


class Policy:
    """How one view is made; an operation that is not named is left out.

    crop      settings of `random_boxes`: a box, resized to the image's size
    affine    settings of `random_affines`, black outside the image
    flip      probability of a left-right flip
    jitter    settings of `color_jitter`
    grayscale probability of losing colour
    blur      p, sigma: [low, high] in pixels, kernel: side in pixels, odd, by default a tenth of the image's
    solarize  p, threshold in [0, 1]

    Crop, affine and flip are one resampling. Images of one channel have no saturation, hue or colour to lose.
    """

    def __init__(
        self,
        crop: Mapping[str, Any] | None = None,
        affine: Mapping[str, Any] | None = None,
        flip: float = 0.0,
        jitter: Mapping[str, Any] | None = None,
        grayscale: float = 0.0,
        blur: Mapping[str, Any] | None = None,
        solarize: Mapping[str, Any] | None = None,
    ):
        self.crop, self.affine, self.flip, self.jitter = crop, affine, flip, jitter
        self.grayscale, self.blur, self.solarize = grayscale, blur, solarize
        check_settings("crop", crop, {"scale": (0, 1), "ratio": (0, math.inf)}, required={"scale"})
        affine_bounds = {"degrees": (0, 180), "translate": (0, 1), "shear": (0, 89), "scale": (0, math.inf)}
        check_settings("affine", affine, affine_bounds)
        strengths = dict.fromkeys(("brightness", "contrast", "saturation"), (0, math.inf))
        check_settings("jitter", jitter, {"p": (0, 1), **strengths, "hue": (0, 0.5)})
        check_settings("blur", blur, {"p": (0, 1), "sigma": (0, math.inf), "kernel": (1, math.inf)}, required={"p", "sigma"})
        check_settings("solarize", solarize, {"p": (0, 1), "threshold": (0, 1)}, required={"p", "threshold"})
        check_settings("policy", {"flip": flip, "grayscale": grayscale}, {"flip": (0, 1), "grayscale": (0, 1)})
        if blur and blur.get("kernel", 1) % 2 != 1:
            raise ValueError(f"blur.kernel={blur['kernel']} is not an odd number of pixels")

    def __call__(self, x: Tensor, draw: "Draw") -> Tensor:
        """x (B, C, H, W) float in [0, 1], the chosen rows of `draw` -> one random view of each, float in [0, 1]."""
        if self.crop or self.affine or self.flip:
            boxes = random_boxes(draw, *x.shape[-2:], **self.crop) if self.crop else None
            matrices = random_affines(draw, *x.shape[-2:], **self.affine) if self.affine else None
            x = resample(x, boxes, draw.coin(self.flip) if self.flip else None, matrices)
        if self.jitter:
            x = color_jitter(x, draw, **self.jitter)
        if self.grayscale and x.shape[1] == 3:
            x = torch.where(column(draw.coin(self.grayscale)), luma(x), x)
        if self.blur:
            kernel = self.blur.get("kernel") or max(3, min(x.shape[-2:]) // 20 * 2 + 1)
            blurred = gaussian_blur(x, draw.uniform(*self.blur["sigma"]), kernel)
            x = torch.where(column(draw.coin(self.blur["p"])), blurred, x)
        if self.solarize:
            x = torch.where(column(draw.coin(self.solarize["p"])), solarize(x, self.solarize["threshold"]), x)
        return x


def check_settings(
    operation: str, settings: Any, bounds: Mapping[str, tuple[float, float]], required: Set[str] = frozenset()
) -> None:
    """Raises ValueError unless `settings` maps some of the names in `bounds`, the required ones among them, to numbers within
    their bounds; scale, ratio and sigma are pairs [low, high] above the lower bound."""
    if settings is None:
        return
    if not isinstance(settings, Mapping) or not required <= settings.keys() <= bounds.keys():
        raise ValueError(f"{operation}={settings} does not consist of: {', '.join(bounds)}")
    for name, value in settings.items():
        low, high = bounds[name]
        if name in ("scale", "ratio", "sigma"):
            pair = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else []
            good = len(pair) == 2 and all(map(is_number, pair)) and low < pair[0] <= pair[1] <= high
            accepted = f"a pair [low, high] above {low}" + (f" and up to {high}" if high < math.inf else "")
        else:
            good = is_number(value) and low <= value <= high
            accepted = f"a number from {low} to {high}" if high < math.inf else f"a number >= {low}"
        if not good:
            raise ValueError(f"{operation}.{name}={value} is not {accepted}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Draw:
    """Random numbers for each of some rows, on the device, from the run's generator. They are drawn for all rows, in whatever
    order these stand; after `choose`, those of the chosen rows are given."""

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator):
        self.rows, self.device, self.generator = rows, device, generator
        self.places = torch.arange(0)  # of the chosen rows, ascending, on the host
        self.chosen: Tensor | None = None  # the same on the device

    def choose(self, places: Tensor) -> None:
        self.places, self.chosen = places, copied(places, self.device)

    def shuffled(self) -> Tensor:
        """A random order of all rows, on the host, which waits for no device: there a generator's state says what was drawn."""
        generator = self.generator
        if self.device.type != "cpu":
            generator = torch.Generator().manual_seed(crc32(self.generator.get_state().numpy().tobytes()))
        return torch.randperm(self.rows, generator=generator)

    def random(self, *after: int, before: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1): (*before, rows, *after)."""
        numbers = torch.rand(*before, self.rows, *after, device=self.device, generator=self.generator)
        return numbers if self.chosen is None else numbers.index_select(len(before), self.chosen)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.random()

    def coin(self, p: float) -> Tensor:
        return self.random() < p

    def quarters(self) -> list[slice]:
        """The chosen rows that are in each quarter of all."""
        ends = [self.rows * q // 4 for q in range(5)]
        if self.chosen is not None:
            ends = torch.searchsorted(self.places, torch.tensor(ends)).tolist()
        return [slice(start, end) for start, end in pairwise(ends)]


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x (B, C, H, W) in [0, 1], mean and std (C,) -> (x - mean) / std, the same in training and evaluation."""
    return (x - mean[:, None, None]) / std[:, None, None]


def column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to act on images."""
    return v[:, None, None, None]


# --- geometry: one bilinear resampling ---------------------------------------------------------------------------------------


def random_boxes(draw: Draw, height: int, width: int, scale: Sequence[float], ratio: Sequence[float] = (3 / 4, 4 / 3)) -> Tensor:
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
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / scale[:, None, None]  # the determinant of a, b, c, d is 1
    shift = -inverse @ torch.stack([right, down], 1)[:, :, None]
    return torch.cat([inverse, shift], 2)


def resample(x: Tensor, boxes: Tensor | None = None, flip: Tensor | None = None, matrices: Tensor | None = None) -> Tensor:
    """One bilinear look-up for crop, flip and affine: output pixel -> flipped -> inside the box -> through the matrix -> input.

    x (B, C, H, W); boxes (B, 4) top, left, height, width; flip (B,) bool; matrices (B, 2, 3) about the image's centre.
    A crop alone reads nothing outside its box (torchvision's resized_crop); an affine reads black outside the image.
    """
    B, _, H, W = x.shape
    down = torch.arange(H, device=x.device).add(0.5).expand(B, H)  # pixel centres, in pixels from the image's corner
    right = torch.arange(W, device=x.device).add(0.5).expand(B, W)
    if flip is not None:
        right = torch.where(flip[:, None], W - right, right)
    if boxes is not None:
        top, left, h, w = boxes[:, :, None].unbind(1)
        down, right = down * (h / H), right * (w / W)
        if matrices is None:
            down, right = down.clamp(min=0.5).minimum(h - 0.5), right.clamp(min=0.5).minimum(w - 0.5)
        down, right = down + top, right + left
    down, right = down - H / 2, right - W / 2
    if matrices is None:
        across, along = right[:, None, :].expand(B, H, W), down[:, :, None].expand(B, H, W)
    else:
        m = matrices[:, :, :, None, None]
        across, along = (m[:, r, 0] * right[:, None, :] + m[:, r, 1] * down[:, :, None] + m[:, r, 2] for r in (0, 1))
    grid = torch.stack([across / (W / 2), along / (H / 2)], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- colour: x in [0, 1], one factor a row ------------------------------------------------------------------------------------


def blend(x: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) reference, clamped to [0, 1]; x (B, C, H, W), factor (B,)."""
    return torch.lerp(reference, x, column(factor)).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, torch.zeros_like(x[:, :1]), factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x), factor)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, 3, H, W), turns (B,) in [-0.5, 0.5] of the colour circle. Value and chroma of a pixel stay, its hue h turns: each
    channel is value - chroma * clip(min(k, 4 - k), 0, 1), with k = (n + 6 h) mod 6 and n = 5, 3, 1 for red, green, blue."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    n = torch.arange(5, 0, -2, device=x.device)[:, None, None]  # made on the device: a copy would wait for it
    k = (sixths + 6 * turns[:, None, None])[:, None].add(n).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def color_jitter(
    x: Tensor,
    draw: Draw,
    p: float = 1.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Tensor:
    """With probability p a row: brightness, contrast, saturation and hue by random factors, in a random order.

    Factors are uniform in [max(0, 1 - strength), 1 + strength], the hue's in [-hue, hue] turns. Brightness, contrast and
    saturation are one blend with a row's own reference, so every row has its own order of them; the hue comes first, second,
    third or last by quarters of the rows, which `Augment` shuffles. No step waits for the device, and none is computed twice.
    """
    x, on = x.clone(), draw.coin(p)
    strengths = (brightness, contrast, saturation)
    factors = torch.stack([torch.where(on, draw.uniform(max(0, 1 - s), 1 + s), 1) for s in strengths], 1)
    turns = torch.where(on, draw.uniform(-hue, hue), 0)
    order = draw.random(3).argsort(1)
    for place, rows in enumerate(draw.quarters()):
        if hue and x.shape[1] == 3:
            x[rows] = adjust_hue(x[rows], turns[rows])
        if place < 3:
            which = order[:, place]
            gray = luma(x)
            contrasted, saturated = column(which == 1), column(which == 2)
            reference = saturated * gray + contrasted * gray.mean((1, 2, 3), keepdim=True)
            x = blend(x, reference, factors.gather(1, which[:, None])[:, 0])
    return x


def luma(x: Tensor) -> Tensor:
    """x (B, 3, H, W) -> (B, 1, H, W); one-channel images are their own luma."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return GRAY[0] * r + GRAY[1] * g + GRAY[2] * b


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Values at or above the threshold are inverted."""
    return torch.where(x >= threshold, 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """x (B, C, H, W), sigma (B,) in pixels, an odd kernel side; mirrored edges, as torchvision's. Two products with a small
    matrix a row, B_y x B_x', since a blur is linear and separable."""
    if kernel // 2 >= min(x.shape[-2:]):
        raise ValueError(f"blur.kernel={kernel} reaches over images of {x.shape[-1]} x {x.shape[-2]} pixels: give a smaller one")
    offsets = torch.arange(kernel, device=x.device) - kernel // 2
    weights = (-(offsets**2) / (2 * sigma[:, None] ** 2)).exp()
    weights = weights / weights.sum(1, keepdim=True)
    blurs = []
    for side in x.shape[-2:]:
        pixels = torch.arange(side, device=x.device)[:, None] + offsets  # (side, kernel), mirrored at both ends
        pixels = side - 1 - (side - 1 - pixels.abs()).abs()
        matrix = torch.zeros(len(x), side, side, device=x.device)
        blurs.append(matrix.scatter_add_(2, pixels.expand(len(x), -1, -1), weights[:, None].expand(-1, side, -1)))
    return blurs[0][:, None] @ x @ blurs[1][:, None].mT


def preview(augment: Augment, data: DataSet, V: int, seed: int, path: Path, images: int = 8) -> None:
    """Writes a picture with a row for each of a few pretraining images: the image itself, then V views of it."""
    order = torch.randperm(len(data.pretrain), generator=torch.Generator().manual_seed(seed))[:images]
    originals, _ = next(data.pretrain.batches(order, images, data.mean.device))
    X = augment(originals, V, data.mean, data.std, torch.Generator(data.mean.device).manual_seed(seed))
    X = X * data.std[:, None, None] + data.mean[:, None, None]
    rows = torch.cat([to_unit(originals)[None], X.unflatten(0, (V, -1))]).transpose(0, 1)
    rows = F.interpolate(rows.flatten(0, 1), scale_factor=max(1, 96 // data.image_size), mode="nearest")
    torchvision.utils.save_image(rows.clamp(0, 1), path, nrow=V + 1, pad_value=1.0)
