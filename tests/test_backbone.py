"""Feature widths, stems and parameter shapes of the backbones; layers of the projectors."""

import re
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants, hf_hub_download
from torch import nn

from ssl_runner import backbone, projector

VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
@pytest.mark.parametrize(
    "build",
    [
        backbone.convnet,
        backbone.linear,
        backbone.vit_tiny,
        lambda c, s: backbone.resnet(c, s, "resnet18"),
        lambda c, s: backbone.from_timm(c, s, "resnet10t"),
    ],
    ids=["convnet", "linear", "vit_tiny", "resnet18", "timm"],
)
def test_backbone_output_has_stated_width(build, channels: int, size: int) -> None:
    model = build(channels, size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, model.width)
    assert model.training


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_stem_depends_on_image_size(name: str, width: int) -> None:
    small, large = backbone.resnet(3, 32, name), backbone.resnet(3, 96, name)
    assert small.width == large.width == width
    assert (small.body.conv1.kernel_size, small.body.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.body.maxpool, nn.Identity)
    reference = torchvision.models.get_model(name)
    reference.fc = nn.Identity()
    assert {n: p.shape for n, p in large.body.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }


@pytest.mark.parametrize(
    ("stem", "kernel", "stride", "sides"),
    [("cifar", 3, 1, (96, 96)), ("pool", 3, 1, (96, 48)), ("imagenet", 7, 2, (48, 24))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet_stem_has_shapes_of_published_network(
    stem: str, kernel: int, stride: int, sides: tuple[int, int], channels: int
) -> None:
    """`sides` of the maps after conv1 and before layer1, for images of 96 pixels, whatever `auto` selects.

    cifar: Chen et al. 2020, appendix B.9. pool: Ermolov et al. 2021 for STL-10 and Tiny ImageNet.
    """
    body = backbone.resnet(channels, 96, "resnet18", stem=stem).body
    assert body.conv1.weight.shape == (64, channels, kernel, kernel)
    assert body.conv1.stride == (stride, stride)
    x = torch.zeros(1, channels, 96, 96)
    with torch.no_grad():
        x = body.conv1(x)
        assert x.shape[-1] == sides[0]
        x = body.maxpool(body.relu(body.bn1(x)))
        assert x.shape[-1] == sides[1]
        assert body.layer4(body.layer3(body.layer2(body.layer1(x)))).shape[-1] == sides[1] // 8


@pytest.mark.parametrize(("size", "stem"), [(32, "cifar"), (64, "cifar"), (65, "imagenet")])
def test_resnet_stem_auto_equals_named_stem(size: int, stem: str) -> None:
    networks = []
    for name in ("auto", stem):
        torch.manual_seed(0)
        networks.append(backbone.resnet(3, size, "resnet18", stem=name))
    assert str(networks[0]) == str(networks[1])
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_resnet_stem_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"backbone\.stem=tiny: expected one of auto, cifar"):
        backbone.resnet(3, 32, "resnet18", stem="tiny")


def test_pretrained_convolution_that_the_stem_replaces_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get_model(name))
    backbone.report_unused.cache_clear()
    backbone.resnet(3, 32, "resnet18", weights="DEFAULT", stem="imagenet")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        backbone.resnet(3, 32, "resnet18", weights="DEFAULT", stem="pool")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("backbone.weights=DEFAULT: conv1.weight of resnet18 is not used (stem=pool with 3")
    backbone.report_unused.cache_clear()


@pytest.mark.parametrize(
    ("name", "side", "settings", "message"),
    [
        (VIT, 28, {}, "16 pixels, found 28 pixels; set dataset.size=32, or +backbone.patch_size=14"),
        (VIT, 28, {"img_size": 28}, "patches of 16 pixels, found 28 pixels; set dataset.size=32"),
        (
            VIT,
            32,
            {"img_size": 28},
            "'Input height (32) doesn't match model (28).'; set +backbone.img_size",
        ),
        (VIT, 24, {"dynamic_img_size": True}, "'Input height (24) should be divisible by patch size"),
        (VIT, 32, {"global_pool": ""}, "found (1, 5, 192) for one image; leave out backbone.global_pool"),
        ("test_resnet", 32, {"global_pool": ""}, "found (1, 96, 1, 1) for one image; leave out backbone"),
        ("test_resnet", 64, {"global_pool": ""}, "found (1, 96, 2, 2) for one image"),
        ("halonet26t", 28, {}, "images of 28 pixels, but it raises 'AssertionError'; set dataset.size=256"),
        ("maxvit_pico_rw_256", 28, {}, "'height (7) must be divisible by window (8)'; set dataset.size=256"),
        ("test_resnet", 32, {"features_only": True}, "features_only=True: expected no such argument"),
        ("test_resnet", 32, {"num_classes": 5}, "backbone.num_classes=5: expected no such argument"),
        ("test_resnet", 32, {"in_chans": 5}, "backbone.in_chans=5: expected no such argument"),
    ],
)
def test_timm_model_that_does_not_suit_the_images_raises_value_error(
    name: str, side: int, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        backbone.from_timm(3, side, name, **settings)


@pytest.mark.parametrize("side", [32, 48])
def test_timm_model_of_fixed_size_is_created_for_the_size_of_the_images(side: int) -> None:
    """With the initial weights that img_size=side gives."""
    networks = []
    for settings in ({}, {"img_size": side}):
        torch.manual_seed(1)
        networks.append(backbone.from_timm(3, side, VIT, **settings))
    assert networks[0](torch.randn(2, 3, side, side)).shape == (2, networks[0].width)
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(a, b)


def test_network_other_than_a_resnet_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"name=squeezenet1_1: expected a ResNet; use backbone=timm"):
        backbone.resnet(3, 32, "squeezenet1_1")


@pytest.mark.parametrize("answers", [True, False])
def test_hub_is_asked_once_before_pretrained_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, answers: bool
) -> None:
    """Without network the cache of the Hub is used, without retries."""
    asked = []

    def urlopen(request: Request, timeout: float) -> nullcontext:
        asked.append((request.full_url, request.method))
        if not answers:
            raise URLError("no network")
        return nullcontext()

    def create_model(name: str, pretrained: bool, **settings: object) -> object:
        if not answers:
            return hf_hub_download("timm/none", "model.safetensors", cache_dir=tmp_path)
        return create(name, **settings)

    create = timm.create_model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbone, "urlopen", urlopen)
    monkeypatch.setattr(timm, "create_model", create_model)
    if answers:
        backbone.from_timm(3, 32, "test_resnet", pretrained=True)
    else:
        with pytest.raises(ValueError, match="pretrained=true: expected weights in the cache"):
            backbone.from_timm(3, 32, "test_resnet", pretrained=True)
    assert asked == [(constants.ENDPOINT, "HEAD")]
    assert constants.HF_HUB_OFFLINE is not answers
    assert capfd.readouterr().err == ""


def test_weights_that_cannot_be_downloaded_raise_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_model(name: str, weights: str) -> nn.Module:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    with pytest.raises(ValueError, match=r"backbone\.weights=DEFAULT: expected weights in the cache or a"):
        backbone.resnet(3, 32, "resnet18", weights="DEFAULT")


def test_linear_backbone_is_one_matrix_product() -> None:
    model = backbone.linear(3, 4, width=5)
    x = torch.randn(7, 3, 4, 4)
    torch.testing.assert_close(model(x), x.flatten(1) @ model.body[1].weight.T)


def test_vit_tiny_number_of_patches() -> None:
    assert backbone.vit_tiny(3, 32).body.patch_embed.num_patches == 64
    assert backbone.vit_tiny(3, 96).body.patch_embed.num_patches == 36


@pytest.mark.parametrize(("side", "near"), [(97, 96), (94, 93), (62, 63), (59, 60), (29, 28)])
def test_vit_tiny_without_suitable_patch_size_raises_value_error(side: int, near: int) -> None:
    with pytest.raises(ValueError, match=rf"found {side} pixels; set dataset.size={near}, or"):
        backbone.vit_tiny(3, side)


@pytest.mark.parametrize("side", [2, 4, 28, 32, 40, 64, 96, 128, 160, 224, 256])
def test_vit_tiny_patches_are_of_the_wanted_size(side: int) -> None:
    wanted = max(1, side / 8) if side <= 64 else 16
    patch = backbone._patch(side)
    assert side % patch == 0
    assert wanted / 2 <= patch <= 2 * wanted


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_projector_layer_widths(depth: int) -> None:
    head = projector.mlp(6, width=10, depth=depth, K=4)
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == [10] * (depth - 1) + [4]
    assert head(torch.randn(5, 6)).shape == (5, 4)
    x = torch.randn(5, 6)
    assert torch.equal(projector.identity(6)(x), x)
