"""Batched augmentation: uint8 originals (n, C, H, W) -> X (V n, C, H, W), view-major, with fresh randomness for every row.

First all random numbers are drawn, for all rows; then the rows are made: on a CPU one by one (`fused`), elsewhere all at once,
by pure tensor functions that take one parameter a row (`geometry`, `color`). Both agree with torchvision.transforms.functional
on one image with the same parameters. Images are float in [0, 1] until normalised, last.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from ssl_runner.color import blend_weights, color_jitter, hue_weights, luma, solarize
from ssl_runner.dataset import DataSet
from ssl_runner.draw import Draw, Drawn
from ssl_runner.geometry import gaussian_blur, random_affines, random_boxes, resample, whole
from ssl_runner.relation import copied


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
        self,
        images: Tensor,
        V: int,
        mean: Tensor,
        std: Tensor,
        generator: torch.Generator,
        part: int = 0,
        parts: int = 1,
        size: int | None = None,
    ) -> Tensor:
        """images (n, C, H, W) uint8 -> V views of each, normalised: (V n, C, H, W) float32, row v n + k a view of image k; or
        views of `size` x `size` pixels.

        Where the images are one of several equal parts of a batch, their views are those that they have in the whole batch: all
        random numbers are drawn for all rows, and the images' own are used.
        """
        n, C, H, W = images.shape
        height, width = (size, size) if size else (H, W)
        X = torch.empty(V * n, C, height, width, device=images.device)
        for which, policy in enumerate(self.policies[:V]):
            v = torch.arange(which, V, len(self.policies))
            drawn = policy.draw(Draw(len(v) * parts * n, images.device, generator), (H, W), (height, width))
            own = torch.arange(len(v) * parts * n).view(len(v), parts, n)[:, part].flatten()
            make = row_by_row if images.device.type == "cpu" else all_at_once
            make(policy, drawn, own, images, own % n, X, v[own // (parts * n)] * n + own % n, mean, std)
        return X


def row_by_row(
    policy: "Policy",
    drawn: Drawn,
    own: Tensor,
    images: Tensor,
    which: Tensor,
    X: Tensor,
    where: Tensor,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Writes views of the images `which` (B,), of (n, C, H, W) uint8, into the rows `where` (B,) of X (N, C, h, w), with what was
    drawn at the positions `own` (B,), on a CPU."""
    from ssl_runner import fused  # numba is for CPUs only

    sizes = (images.shape[2], images.shape[3]), (X.shape[2], X.shape[3])
    threshold = policy.solarize["threshold"] if policy.solarize else 0.0
    fused.make(
        images,
        which,
        X,
        where,
        own,
        drawn.numbers | drawn.choices,
        mean,
        std,
        policy.kernel(*sizes),
        threshold,
    )


def all_at_once(
    policy: "Policy",
    drawn: Drawn,
    own: Tensor,
    images: Tensor,
    which: Tensor,
    X: Tensor,
    where: Tensor,
    mean: Tensor,
    std: Tensor,
) -> None:
    """The same on any device, by operations on all rows."""
    if policy.jitter:  # rows that treat the hue alike stand together
        order = drawn.choices["place"][own].argsort(stable=True)
        own, which, where = own[order], which[order], where[order]
    x = to_unit(images.index_select(0, copied(which, images.device)))
    x = policy(x, drawn.of(own, images.device), (X.shape[2], X.shape[3]))
    X.index_copy_(0, copied(where, images.device), normalize(x, mean, std))


class Policy:
    """How one view is made; an operation that is not named is left out.

    crop      settings of `random_boxes`: a box, resized to the view's size
    affine    settings of `random_affines`, black outside the image
    flip      probability of a left-right flip
    jitter    p, and the strengths of brightness, contrast, saturation and hue: factors are uniform in
              [max(0, 1 - strength), 1 + strength], the hue turns by up to +-strength; all four in a random order
    grayscale probability of losing colour
    blur      p, sigma: [low, high] and kernel: side, odd, by default a tenth of the image's, both in pixels of the image
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
        check_settings(
            "blur",
            blur,
            {"p": (0, 1), "sigma": (0, math.inf), "kernel": (1, math.inf)},
            required={"p", "sigma"},
        )
        check_settings("solarize", solarize, {"p": (0, 1), "threshold": (0, 1)}, required={"p", "threshold"})
        check_settings(
            "policy", {"flip": flip, "grayscale": grayscale}, {"flip": (0, 1), "grayscale": (0, 1)}
        )
        if blur and blur.get("kernel", 1) % 2 != 1:
            raise ValueError(f"blur.kernel={blur['kernel']} is not an odd number of pixels")

    def draw(self, draw: Draw, own: tuple[int, int], size: tuple[int, int]) -> Drawn:
        """Everything random about some views of the given size of images of size `own`."""
        numbers: dict[str, Tensor] = {}
        choices: dict[str, Tensor] = {}
        boxes = random_boxes(draw, *own, **self.crop) if self.crop else whole(draw.rows, *own, draw.device)
        flip = draw.random() < self.flip
        if self.crop or self.affine or self.flip:
            numbers |= {"boxes": boxes, "flip": flip}
        if self.affine:
            numbers["matrices"] = random_affines(draw, *own, **self.affine)
        if self.jitter:
            strengths = [self.jitter.get(name, 0.0) for name in ("brightness", "contrast", "saturation")]
            factors = torch.stack([draw.uniform(max(0, 1 - s), 1 + s) for s in strengths], 1)
            numbers["blends"] = blend_weights(factors, draw.random(3).argsort(1))
            hue = self.jitter.get("hue", 0.0)
            turns = draw.uniform(-hue, hue)
            if hue:
                numbers["hues"] = hue_weights(turns)
            choices["place"] = torch.where(draw.coin(self.jitter.get("p", 1.0)), draw.choice(4), 4)
        if self.grayscale:
            choices["grayscale"] = draw.coin(self.grayscale)
        if self.blur:
            low, high = (sigma * size[1] / own[1] for sigma in self.blur["sigma"])
            numbers["sigma"] = draw.uniform(low, high)
            choices["blur"] = draw.coin(self.blur["p"])
        if self.solarize:
            choices["solarize"] = draw.coin(self.solarize["p"])
        return Drawn(numbers, choices)

    def kernel(self, own: tuple[int, int], size: tuple[int, int]) -> int:
        """The side of the blur's kernel in pixels of the view, 1 without a blur. ValueError where it reaches over the view."""
        if not self.blur:
            return 1
        side = (
            odd(size[1] / own[1] * self.blur["kernel"])
            if "kernel" in self.blur
            else max(3, odd(min(size) / 10))
        )
        if side // 2 >= min(size):
            raise ValueError(
                f"blur.kernel={side} reaches over views of {size[1]} x {size[0]} pixels: give a smaller one"
            )
        return side

    def __call__(self, x: Tensor, drawn: Drawn, size: tuple[int, int]) -> Tensor:
        """x (B, C, H, W) float in [0, 1], changed in place, and what was drawn for it, `place` ascending -> one view of each, of
        the given size, float in [0, 1]."""
        C, *own = x.shape[1:]
        numbers, choices = drawn.numbers, drawn.choices
        if "boxes" in numbers or (own[0], own[1]) != size:
            x = resample(x, numbers.get("boxes"), numbers.get("flip"), numbers.get("matrices"), size)
        if self.jitter:
            x = color_jitter(x, numbers["blends"], numbers.get("hues") if C == 3 else None, choices["place"])
        if self.grayscale and C == 3:
            x = where(choices["grayscale"], x, lambda y: luma(y).repeat(1, 3, 1, 1))
        if self.blur:
            kernel = self.kernel((own[0], own[1]), size)
            x = where(choices["blur"], x, lambda y, sigma: gaussian_blur(y, sigma, kernel), numbers["sigma"])
        if self.solarize:
            threshold = self.solarize["threshold"]
            x = where(choices["solarize"], x, lambda y: solarize(y, threshold))
        return x


def odd(pixels: float) -> int:
    """A number of pixels as the side of a kernel with a middle: 4 and 5.9 -> 5, 6 -> 7."""
    return int(pixels / 2) * 2 + 1


def where(chosen: Tensor, x: Tensor, operation: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """x with the operation on the chosen rows, (B,) bool on the host, and their numbers (B,); changes x in place."""
    if chosen.all():
        return operation(x, *numbers)
    rows = copied(chosen.nonzero()[:, 0], x.device)
    if len(rows):
        x.index_copy_(
            0, rows, operation(x.index_select(0, rows), *(number.index_select(0, rows) for number in numbers))
        )
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


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float().mul_(1 / 255)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x (B, C, H, W) in [0, 1], mean and std (C,) -> (x - mean) / std, the same in training and evaluation."""
    return (x - mean[:, None, None]).mul_(1 / std[:, None, None])


def preview(augment: Augment, data: DataSet, V: int, seed: int, path: Path, images: int = 8) -> None:
    """Writes a picture with a row for each of a few pretraining images: the image itself, then V views of it."""
    order = torch.randperm(len(data.pretrain), generator=torch.Generator().manual_seed(seed))[:images]
    originals, _ = next(data.pretrain.batches(order, images, data.mean.device))
    X = augment(originals, V, data.mean, data.std, torch.Generator(data.mean.device).manual_seed(seed))
    X = X * data.std[:, None, None] + data.mean[:, None, None]
    rows = torch.cat([to_unit(originals)[None], X.unflatten(0, (V, -1))]).transpose(0, 1)
    rows = F.interpolate(rows.flatten(0, 1), scale_factor=max(1, 96 // data.image_size), mode="nearest")
    torchvision.utils.save_image(rows.clamp(0, 1), path, nrow=V + 1, pad_value=1.0)
