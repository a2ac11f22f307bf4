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


def test_linear_backbone_is_one_matrix_product() -> None:
    model = backbone.linear(3, 4, width=5)
    x = torch.randn(7, 3, 4, 4)
    torch.testing.assert_close(model(x), x.flatten(1) @ model.body[1].weight.T)


def test_vit_tiny_number_of_patches() -> None:
    assert backbone.vit_tiny(3, 32).body.patch_embed.num_patches == 64
    assert backbone.vit_tiny(3, 96).body.patch_embed.num_patches == 36


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_projector_layer_widths(depth: int) -> None:
    head = projector.mlp(6, width=10, depth=depth, K=4)
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == [10] * (depth - 1) + [4]
    assert head(torch.randn(5, 6)).shape == (5, 4)
    x = torch.randn(5, 6)
    assert torch.equal(projector.identity(6)(x), x)
