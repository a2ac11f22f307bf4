"""Batched augmentation: uint8 images (n, C, H, W) -> views X (V n, C, H, W), with random parameters per row.

X is view-major. The random parameters of all rows are drawn first. The views are then computed row by row on
a CPU (`fused`), and for the whole batch on other devices, by pure tensor functions with one parameter per row
(`geometry`, `color`). Both agree with torchvision.transforms.functional on one image with equal parameters.
Images are float in [0, 1]; normalisation is the last step.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ssl_runner.device import to_device
from ssl_runner.views import cpu_kernels
from ssl_runner.views.color import blend_weights, color_jitter, hue_weights, luma, solarize
from ssl_runner.views.geometry import full_boxes, gaussian_blur, random_affines, random_boxes, resample
from ssl_runner.views.sampler import Params, ParamSampler


class Augment:
    """Computes V augmented views of every image of a batch.

    `policies` maps names to the arguments of a `Policy`. View v uses policy number v mod len(policies), so a
    single policy works for any V. Raises ValueError if there is no policy or an argument is invalid.
    """

    def __init__(self, policies: Mapping[str, Mapping[str, Any]]):
        if not policies:
            raise ValueError(
                "views.policies={}: expected at least one policy; add one, such as {all: {flip: 0.5}}"
            )
        self.policies = []
        for name, settings in policies.items():
            try:
                self.policies.append(Policy(**settings))
            except TypeError as error:
                raise ValueError(f"views.policies.{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"views.policies.{name}.{error}") from error

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
        """Return V normalised views of every image.

        images     (n, C, H, W) uint8
        mean, std  (C,) per-channel statistics in [0, 1]
        size       side of the views in pixels, by default that of the images
        returns    (V n, C, H, W) float32, or (V n, C, size, size); row v n + k is view v of image k

        If the images are shard `part` of a batch that is split into `parts` equal shards, their views equal
        those that they have in the whole batch: parameters are drawn for all rows of the batch, and those of
        the shard are selected.
        """
        n, C, H, W = images.shape
        height, width = (size, size) if size else (H, W)
        X = torch.empty(V * n, C, height, width, device=images.device)
        for which, policy in enumerate(self.policies[:V]):
            v = torch.arange(which, V, len(self.policies))
            drawn = policy.draw(
                ParamSampler(len(v) * parts * n, images.device, generator), (H, W), (height, width)
            )
            own = torch.arange(len(v) * parts * n).view(len(v), parts, n)[:, part].flatten()
            make = augment_rows_cpu if images.device.type == "cpu" else augment_batch
            make(policy, drawn, own, images, own % n, X, v[own // (parts * n)] * n + own % n, mean, std)
        return X


def augment_rows_cpu(
    policy: "Policy",
    drawn: Params,
    own: Tensor,
    images: Tensor,
    which: Tensor,
    X: Tensor,
    where: Tensor,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Compute B views on a CPU, one row at a time, and write them into X.

    drawn   sampled parameters of R rows
    own     (B,) index into `drawn` of each view
    images  (n, C, H, W) uint8
    which   (B,) index into `images` of each view
    X       (N, C, h, w) float32, written in place
    where   (B,) row of X of each view
    """

    sizes = (images.shape[2], images.shape[3]), (X.shape[2], X.shape[3])
    threshold = policy.solarize["threshold"] if policy.solarize else 0.0
    cpu_kernels.make(
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


def augment_batch(
    policy: "Policy",
    drawn: Params,
    own: Tensor,
    images: Tensor,
    which: Tensor,
    X: Tensor,
    where: Tensor,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Compute B views on any device with batched operations. Arguments as in `row_by_row`."""
    if policy.jitter:  # sort by hue position so that each group is one contiguous slice
        order = drawn.choices["place"][own].argsort(stable=True)
        own, which, where = own[order], which[order], where[order]
    x = to_unit(images.index_select(0, to_device(which, images.device)))
    x = policy(x, drawn.of(own, images.device), (X.shape[2], X.shape[3]))
    X.index_copy_(0, to_device(where, images.device), normalize(x, mean, std))


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
        check_settings("", {"flip": flip, "grayscale": grayscale}, {"flip": (0, 1), "grayscale": (0, 1)})
        if blur and blur.get("kernel", 1) % 2 != 1:
            raise ValueError(f"blur.kernel={blur['kernel']}: expected an odd number of pixels, such as 5")

    def draw(self, draw: ParamSampler, own: tuple[int, int], size: tuple[int, int]) -> Params:
        """Sample all random parameters of `draw.rows` views.

        `own` and `size` are (height, width) of the images and of the views.
        """
        numbers: dict[str, Tensor] = {}
        choices: dict[str, Tensor] = {}
        boxes = (
            random_boxes(draw, *own, **self.crop) if self.crop else full_boxes(draw.rows, *own, draw.device)
        )
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
        return Params(numbers, choices)

    def kernel(self, own: tuple[int, int], size: tuple[int, int]) -> int:
        """Return the side of the blur kernel in pixels of the view, or 1 without a blur.

        `own` and `size` are (height, width) of the images and of the views. Raises ValueError if the side is
        at least twice that of the view, because edges are mirrored only once.
        """
        if not self.blur:
            return 1
        side = (
            odd(size[1] / own[1] * self.blur["kernel"])
            if "kernel" in self.blur
            else max(3, odd(min(size) / 10))
        )
        if side // 2 >= min(size):
            raise ValueError(
                f"blur.kernel={side}: expected at most {2 * min(size) - 1} for views of {size[1]} x {size[0]}"
                " pixels (kernel in pixels of the view); use a smaller kernel"
            )
        return side

    def __call__(self, x: Tensor, drawn: Params, size: tuple[int, int]) -> Tensor:
        """Apply the operations with the given parameters to a batch, on any device.

        x        (B, C, H, W) float in [0, 1], modified in place
        drawn    sampled parameters of the B rows, sorted by `place` (the position of the hue among the jitter
                 operations)
        size     (height, width) of the views
        returns  (B, C, height, width) float in [0, 1]
        """
        C, *own = x.shape[1:]
        numbers, choices = drawn.numbers, drawn.choices
        if "boxes" in numbers or (own[0], own[1]) != size:
            x = resample(x, numbers.get("boxes"), numbers.get("flip"), numbers.get("matrices"), size)
        if self.jitter:
            x = color_jitter(x, numbers["blends"], numbers.get("hues") if C == 3 else None, choices["place"])
        if self.grayscale and C == 3:
            x = apply_where(choices["grayscale"], x, lambda y: luma(y).repeat(1, 3, 1, 1))
        if self.blur:
            kernel = self.kernel((own[0], own[1]), size)
            x = apply_where(
                choices["blur"], x, lambda y, sigma: gaussian_blur(y, sigma, kernel), numbers["sigma"]
            )
        if self.solarize:
            threshold = self.solarize["threshold"]
            x = apply_where(choices["solarize"], x, lambda y: solarize(y, threshold))
        return x


def odd(pixels: float) -> int:
    """Round a number of pixels to the side of a centred kernel, an odd integer: 4 and 5.9 -> 5, 6 -> 7."""
    return int(pixels / 2) * 2 + 1


def apply_where(chosen: Tensor, x: Tensor, operation: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """Apply an operation to the chosen rows of x, and return the result.

    chosen (B,) bool on the host; x (B, C, H, W), modified in place unless all rows are chosen; numbers
    (B,): parameters of the operation.
    """
    if chosen.all():
        return operation(x, *numbers)
    rows = to_device(chosen.nonzero()[:, 0], x.device)
    if len(rows):
        x.index_copy_(
            0, rows, operation(x.index_select(0, rows), *(number.index_select(0, rows) for number in numbers))
        )
    return x


def check_settings(
    operation: str, settings: Any, bounds: Mapping[str, tuple[float, float]], required: Set[str] = frozenset()
) -> None:
    """Raise ValueError if the settings of an operation are invalid. None is valid.

    `settings` must be a mapping from names in `bounds`, including all `required` ones, to numbers within
    their bounds. scale, ratio and sigma are pairs [low, high] whose values exceed the lower bound.
    `operation` is the prefix of keys in error messages, empty for options of the policy itself.
    """
    if settings is None:
        return
    if not isinstance(settings, Mapping) or not required <= settings.keys() <= bounds.keys():
        advice = f"include {', '.join(sorted(required))}" if required else "remove other keys"
        raise ValueError(
            f"{operation}={settings}: expected a mapping with keys {', '.join(bounds)}; {advice}"
        )
    for name, value in settings.items():
        low, high = bounds[name]
        if name in ("scale", "ratio", "sigma"):
            pair = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else []
            good = len(pair) == 2 and all(map(is_number, pair)) and low < pair[0] <= pair[1] <= high
            accepted = f"a pair [low, high] with {low} < low <= high" + (
                f" <= {high}" if high < math.inf else ""
            )
        else:
            good = is_number(value) and low <= value <= high
            accepted = f"a number from {low} to {high}" if high < math.inf else f"a number >= {low}"
        if not good:
            key = f"{operation}.{name}" if operation else name
            raise ValueError(f"{key}={value}: expected {accepted}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]."""
    return images.float().mul_(1 / 255)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std for x (B, C, H, W) in [0, 1], mean and std (C,). Also used in evaluation."""
    return (x - mean[:, None, None]).mul_(1 / std[:, None, None])
