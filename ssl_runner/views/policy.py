"""A policy: the random operations that make one view, their parameters, and the batched computation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_runner.rule import Rule
from ssl_runner.views.color import blend_weights, color_jitter, hue_weights, luma, solarize
from ssl_runner.views.geometry import (
    full_boxes,
    gaussian_blur,
    random_affines,
    random_boxes,
    resample,
    to_unit,
)
from ssl_runner.views.sampler import Params, ParamSampler

FRACTION, POSITIVE, NON_NEGATIVE = Rule(float, 0, 1), Rule(float, 0, open_low=True), Rule(float, 0)
RULES = {  # operation -> its settings
    "crop": {"scale": Rule(float, 0, 1, open_low=True), "ratio": POSITIVE},
    "affine": {
        "degrees": Rule(float, 0, 180),
        "translate": FRACTION,
        "scale": POSITIVE,
        "shear": Rule(float, 0, 89),
    },
    "jitter": {
        "p": FRACTION,
        "brightness": NON_NEGATIVE,
        "contrast": NON_NEGATIVE,
        "saturation": NON_NEGATIVE,
        "hue": Rule(float, 0, 0.5),
    },
    "blur": {"p": FRACTION, "sigma": POSITIVE, "kernel": Rule(int, 1)},
    "solarize": {"p": FRACTION, "threshold": FRACTION},
}
REQUIRED = {"crop": {"scale"}, "blur": {"p", "sigma"}, "solarize": {"p", "threshold"}}
RANGES = {"scale", "ratio", "sigma"}  # settings that are pairs [low, high]


class Policy:
    """The random operations that produce one view, applied in this order. Those not given are skipped.

    crop       arguments of `random_boxes`; the box is resized to the size of the view
    affine     arguments of `random_affines`; pixels outside the image are black
    flip       probability of a horizontal flip
    jitter     p, brightness, contrast, saturation, hue: probability and strengths; factors are uniform in
               [max(0, 1 - strength), 1 + strength], the hue shift is uniform in [-hue, hue] (fractions of the
               colour circle), and the four operations are applied in random order
    grayscale  probability of conversion to grayscale
    blur       p, sigma: [low, high], kernel: odd side, by default a tenth of the image side; sigma and kernel
               are in pixels of the image
    solarize   p, threshold in [0, 1]

    Crop, affine and flip are a single resampling. Saturation, hue and grayscale leave one-channel images
    unchanged. Raises ValueError if an argument is out of range.
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
        given = {"crop": crop, "affine": affine, "jitter": jitter, "blur": blur, "solarize": solarize}
        for operation, settings in given.items():
            check_settings(operation, settings)
        self.crop, self.affine, self.jitter, self.blur, self.solarize = map(plain, given.values())
        self.flip, self.grayscale = flip, grayscale
        for name, probability in (("flip", flip), ("grayscale", grayscale)):
            if not FRACTION.accepts(probability):
                raise ValueError(f"{name}={probability}: expected {FRACTION}")
        if blur and blur.get("kernel", 1) % 2 != 1:
            raise ValueError(f"blur.kernel={blur['kernel']}: expected an odd number of pixels, such as 5")

    def sample_params(
        self, sampler: ParamSampler, image_size: tuple[int, int], size: tuple[int, int]
    ) -> Params:
        """Sample all random parameters of `sampler.rows` views.

        `image_size` and `size` are (height, width) of the images and of the views.
        """
        params: Params = {}
        boxes = (
            random_boxes(sampler, *image_size, **self.crop)
            if self.crop
            else full_boxes(sampler.rows, *image_size, sampler.device)
        )
        flip = sampler.random() < self.flip
        if self.crop or self.affine or self.flip:
            params |= {"boxes": boxes, "flip": flip}
        if self.affine:
            params["matrices"] = random_affines(sampler, *image_size, **self.affine)
        if self.jitter:
            strengths = [self.jitter.get(name, 0.0) for name in ("brightness", "contrast", "saturation")]
            factors = [sampler.uniform(max(0, 1 - s), 1 + s) for s in strengths]
            params["blends"] = blend_weights(factors, sampler.random(3).argsort(1))
            hue = self.jitter.get("hue", 0.0)
            turns = sampler.uniform(-hue, hue)
            if hue:
                params["hues"] = hue_weights(turns)
            params["hue_position"] = torch.where(
                sampler.coin(self.jitter.get("p", 1.0)), sampler.choice(4), 4
            )
        if self.grayscale:
            params["grayscale"] = sampler.coin(self.grayscale)
        if self.blur:
            low, high = (sigma * size[1] / image_size[1] for sigma in self.blur["sigma"])
            params["sigma"] = sampler.uniform(low, high)
            params["blur"] = sampler.coin(self.blur["p"])
        if self.solarize:
            params["solarize"] = sampler.coin(self.solarize["p"])
        return params

    def kernel(self, image_size: tuple[int, int], size: tuple[int, int]) -> int:
        """Return the side of the blur kernel in pixels of the view, or 1 without a blur.

        `image_size` and `size` are (height, width) of the images and of the views. Raises ValueError if the
        side is at least twice that of the view, because edges are mirrored only once.
        """
        if not self.blur:
            return 1
        side = (
            odd(size[1] / image_size[1] * self.blur["kernel"])
            if "kernel" in self.blur
            else max(3, odd(min(size) / 10))
        )
        if side // 2 >= min(size):
            raise ValueError(
                f"blur.kernel={side}: expected at most {2 * min(size) - 1} for views of {size[1]} x {size[0]}"
                " pixels (kernel in pixels of the view); use a smaller kernel"
            )
        return side

    def __call__(self, images: Tensor, params: Params, size: tuple[int, int]) -> Tensor:
        """Apply the operations with the given parameters to a batch.

        images   (B, C, H, W) uint8
        params   sampled parameters of the B rows
        size     (height, width) of the views
        returns  (B, C, height, width) float in [0, 1]

        All operations process all rows, and shapes and control flow do not depend on values. An operation
        that a row does not have leaves the row unchanged.
        """
        _, C, H, W = images.shape
        if "boxes" in params or size != (H, W):
            x = resample(images, params.get("boxes"), params.get("flip"), params.get("matrices"), size)
        else:
            x = to_unit(images)
        channels: Sequence[Tensor] = x.unbind(1)
        if self.jitter:
            channels = color_jitter(channels, params["blends"], params.get("hues"), params["hue_position"])
        if self.grayscale and C == 3:
            gray = luma(channels)
            channels = [torch.where(params["grayscale"][:, None, None], gray, x) for x in channels]
        x = torch.stack([*channels], 1)
        if self.blur:
            x = gaussian_blur(x, params["sigma"], self.kernel((H, W), size), params["blur"])
        if self.solarize:
            inverted = solarize(x, self.solarize["threshold"])
            x = torch.where(params["solarize"][:, None, None, None], inverted, x)
        return x


def plain(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the settings of an operation as a dict of numbers and tuples, without types of OmegaConf."""
    if settings is None:
        return None
    return {name: tuple(value) if name in RANGES else value for name, value in settings.items()}


def odd(pixels: float) -> int:
    """Round a number of pixels to the side of a centred kernel, an odd integer: 4 and 5.9 -> 5, 6 -> 7."""
    return int(pixels / 2) * 2 + 1


def check_settings(operation: str, settings: Any) -> None:
    """Raise ValueError if the settings of an operation are invalid. None is valid."""
    if settings is None:
        return
    rules, required = RULES[operation], REQUIRED.get(operation, set())
    if not isinstance(settings, Mapping) or not required <= settings.keys() <= rules.keys():
        advice = f"include {', '.join(sorted(required))}" if required else "remove other keys"
        raise ValueError(f"{operation}={settings}: expected a mapping with keys {', '.join(rules)}; {advice}")
    for name, value in settings.items():
        rule = rules[name]
        if name not in RANGES:
            if not rule.accepts(value):
                raise ValueError(f"{operation}.{name}={value}: expected {rule}")
            continue
        ends = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else []
        if not (len(ends) == 2 and all(map(rule.accepts, ends)) and ends[0] <= ends[1]):
            raise ValueError(f"{operation}.{name}={value}: expected a pair [low, high], each {rule}")
