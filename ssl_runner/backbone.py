"""Backbones: images (B, C, H, W) -> features (B, width). Probes are fitted on these features."""

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torchvision
from torch import Tensor, nn

from ssl_runner.errors import one_line
from ssl_runner.names import STEMS

SMALL_IMAGE = 64  # pixels per side: up to this size ResNets use the CIFAR stem


class Backbone(nn.Module):
    """A network together with its feature width: images (B, C, H, W) -> features (B, width)."""

    width: int

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.width = body, width

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def convnet(channels: int, image_size: int, widths: Sequence[int] = (32, 64, 128, 256)) -> Backbone:
    """Small convolutional network, fast on a CPU.

    One 3x3 convolution with batch norm and ReLU per entry of `widths`. All but the last have stride 2, which
    halves the image side. Global average pooling follows.

    Raises ValueError if `widths` is not a non-empty list of integers >= 1.
    """
    if not widths or not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ValueError(
            f"backbone.widths={widths}: expected a list of integers >= 1, such as [32,64,128,256]"
        )
    layers: list[nn.Module] = []
    for depth, width in enumerate(widths):
        stride = 2 if depth < len(widths) - 1 else 1
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1])


def resnet(
    channels: int, image_size: int, name: str, weights: str | None = None, stem: str = "auto"
) -> Backbone:
    """A torchvision ResNet, optionally with pretrained weights.

    stem  cifar     3x3 convolution, stride 1, no pooling
          pool      3x3 convolution, stride 1, and the max-pooling, which halves the side
          imagenet  7x7 convolution, stride 2, and the max-pooling: torchvision's own
          auto      cifar for images of up to 64 pixels per side, imagenet for larger ones

    A first convolution that differs from that of the pretrained network has new weights. One line on standard
    error reports it. Raises ValueError for an unknown stem, for a network that is not a ResNet, and if the
    weights cannot be downloaded.
    """
    if stem not in STEMS:
        raise ValueError(f"backbone.stem={stem}: expected one of {', '.join(STEMS)}; use auto")
    if stem == "auto":
        stem = "cifar" if image_size <= SMALL_IMAGE else "imagenet"
    with downloading(f"backbone.weights={weights}"):
        body = torchvision.models.get_model(name, weights=weights)
    if not isinstance(body, torchvision.models.ResNet):
        raise ValueError(f"backbone.name={name}: expected a ResNet; use backbone=timm for other networks")
    width = body.fc.in_features
    body.fc = nn.Identity()
    new_convolution = True
    if stem in ("cifar", "pool"):
        body.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    elif channels != 3:
        body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    else:
        new_convolution = False
    if stem == "cifar":
        body.maxpool = nn.Identity()
    if weights is not None and new_convolution:
        report_unused(name, weights, stem, channels)
    return Backbone(body, width)


@cache
def report_unused(name: str, weights: str, stem: str, channels: int) -> None:
    """Write to standard error, once per process, that the pretrained first convolution is not used."""
    print(
        f"backbone.weights={weights}: conv1.weight of {name} is not used (stem={stem} with {channels}"
        " channels has another shape); it is trained from its random initial values",
        file=sys.stderr,
    )


def from_timm(channels: int, image_size: int, name: str, **settings: Any) -> Backbone:
    """A timm model without its classifier. `settings` are passed to timm.create_model.

    A model of fixed size that does not accept images of this size is created with `img_size=image_size`, if
    it has this argument.

    Raises ValueError for an unknown name, for settings that are not those of a backbone, for a model that
    does not accept the images or uses only a part of them, and if the features are not (B, width).
    """
    import timm  # takes about a second and is not needed by other backbones

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"backbone.name={name}: expected a timm model; {hint}timm.list_models() returns all names"
        )
    for given in settings.keys() & {"num_classes", "in_chans", "features_only"}:
        raise ValueError(
            f"backbone.{given}={settings[given]}: expected no such argument, because a backbone takes the"
            " channels of the data set and returns one vector of features per image; leave it out"
        )
    if settings.get("pretrained"):
        use_cache_without_network()

    def create(**size: Any) -> Any:
        with downloading("backbone.pretrained=true") if settings.get("pretrained") else nullcontext():
            return timm.create_model(name, num_classes=0, in_chans=channels, **settings, **size)

    random_state = torch.get_rng_state()
    body = create()
    features = output_of(body, channels, image_size)
    if isinstance(features, Exception) and "img_size" not in settings:
        torch.set_rng_state(random_state)
        try:
            body = create(img_size=image_size)
            features = output_of(body, channels, image_size)
        except (TypeError, RuntimeError, AssertionError, ArithmeticError):
            pass  # the model has no such argument, or no such size
    if isinstance(features, Exception):
        size = f"+backbone.img_size={image_size}"
        if "img_size" not in settings:
            size = f"dataset.size={body.default_cfg['input_size'][-1]}"
        raise ValueError(
            f"backbone.name={name}: expected a model for images of {image_size} pixels, but it raises"
            f" '{one_line(features)}'; set {size}, or choose another model"
        )
    check_pooled(name, features, settings)
    check_patches(name, body, image_size)
    return Backbone(body.train(), features.shape[1])


def check_pooled(name: str, features: Any, settings: dict[str, Any]) -> None:
    """Raise ValueError unless a timm model with these settings returns features of shape (rows, width)."""
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        remedy = "leave out backbone.global_pool" if "global_pool" in settings else "choose another model"
        raise ValueError(
            f"backbone.name={name}: expected features of shape (rows, width), found {found} for one image;"
            f" {remedy}"
        )


def output_of(network: nn.Module, channels: int, side: int, device: torch.device | None = None) -> Any:
    """What a network returns for one image of 0 in eval mode, or the exception that it raises."""
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(1, channels, side, side, device=device))
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        return error


def check_patches(name: str, body: nn.Module, image_size: int) -> None:
    """Raise ValueError if timm's patches do not cover the image: its margin would not be used."""
    from timm.layers import PatchEmbed

    embed = getattr(body, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    patch = embed.patch_size[0]
    if image_size % patch:
        multiple = max(1, round(image_size / patch)) * patch
        divisors = [side for side in range(1, image_size + 1) if image_size % side == 0]
        divisor = min(divisors, key=lambda side: abs(side - patch))
        raise ValueError(
            f"backbone.name={name}: expected a side that divides into patches of {patch} pixels, found"
            f" {image_size} pixels; set dataset.size={multiple}, or +backbone.patch_size={divisor}"
        )


def use_cache_without_network() -> None:
    """Make the Hugging Face Hub read its cache only if it cannot be reached, instead of retrying."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=10):
            pass
    except HTTPError:
        pass  # it answers
    except OSError:
        constants.HF_HUB_OFFLINE = True


@contextmanager
def downloading(option: str) -> Iterator[None]:
    """Context manager that raises ValueError if pretrained weights cannot be downloaded."""
    try:
        yield
    except OSError as error:
        reason = one_line(error)
        found = reason if len(reason) <= 100 else type(error).__name__  # the Hub's message has 40 words
        raise ValueError(
            f"{option}: expected weights in the cache or a connection to the network, found '{found}';"
            " connect, or give a file with init_weights=<file>"
        ) from error


def vit_tiny(channels: int, image_size: int) -> Backbone:
    """timm's ViT-Ti for images of image_size x image_size pixels.

    The patch size is a divisor of image_size: the one closest to image_size / 8 for images of up to 64 pixels
    per side, the one closest to 16 pixels for larger images. Raises ValueError if it would be less than half
    or more than twice that size.
    """
    patch = _patch(image_size)
    if patch is None:
        near = next(
            side
            for distance in range(1, image_size)
            for side in (image_size - distance, image_size + distance)
            if _patch(side)
        )
        raise ValueError(
            f"vit_tiny: expected a side that divides into patches, found {image_size} pixels; set"
            f" dataset.size={near}, or use another backbone"
        )
    return from_timm(channels, image_size, "vit_tiny_patch16_224", img_size=image_size, patch_size=patch)


def _patch(side: int) -> int | None:
    """Patch size of vit_tiny, in pixels. None if there is no suitable divisor of the side."""
    wanted = max(1, side / 8) if side <= SMALL_IMAGE else 16
    divisors = [p for p in range(1, side + 1) if side % p == 0 and wanted / 2 <= p <= 2 * wanted]
    return min(divisors, key=lambda p: abs(p - wanted), default=None)


class LinearBackbone(Backbone):
    """Linear map of the flattened pixels, x -> W'x + b, with b initialised to 0.

    For this backbone every loss has a closed-form optimum.
    """

    def __init__(self, pixels: int, width: int):
        matrix = nn.Linear(pixels, width)
        nn.init.zeros_(matrix.bias)
        super().__init__(nn.Sequential(nn.Flatten(), matrix), width)


def linear(channels: int, image_size: int, width: int = 256) -> Backbone:
    """One linear layer on the flattened pixels. See LinearBackbone."""
    return LinearBackbone(channels * image_size**2, width)
