"""Feature widths, stems and parameter shapes of the backbones; layers of the projectors."""

import pytest
import torch
import torchvision
from torch import nn

from ssl_runner import backbone, projector


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
