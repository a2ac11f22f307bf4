"""SSLModel: embeddings, feature width, modes."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssl_runner.backbone import Backbone, convnet
from ssl_runner.model import SSLModel, count_parameters, eval_mode, output_width
from ssl_runner.projector import identity, linear, mlp


def test_forward_is_projector_of_backbone() -> None:
    backbone, projector = convnet(3, 8, [4, 6]), mlp(6, 7, 2, 5)
    model, x = SSLModel(backbone, projector).eval(), torch.randn(4, 3, 8, 8)
    assert_close(model(x), projector(backbone(x)))
    assert_close(model.features(x), backbone(x))


def test_features_are_flattened() -> None:
    model = SSLModel(Backbone(nn.Identity(), 48), nn.Identity())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.features(x), x.reshape(2, 48))


@pytest.mark.parametrize(
    ("projector", "K"),
    [(mlp(6, 7, 2, 5), 5), (linear(6, 3), 3), (identity(6), 6), (nn.Sequential(nn.Dropout(0.5)), 6)],
)
def test_output_width_is_the_number_of_columns(projector: nn.Module, K: int) -> None:
    assert output_width(projector, 6) == SSLModel(convnet(3, 8, [6]), projector).K == K


def test_output_width_leaves_batch_norm_unchanged() -> None:
    projector = mlp(6, 7, 2, 5)
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    output_width(projector, 6)
    assert_close(projector.state_dict(), before, rtol=0, atol=0)


def test_memory_format_follows_channels_last() -> None:
    parts = convnet(3, 8, [6]), identity(6)
    assert SSLModel(*parts, channels_last=True).memory_format == torch.channels_last
    assert SSLModel(*parts).memory_format == torch.contiguous_format


def test_eval_mode_restores_the_mode_of_every_module_after_an_error() -> None:
    model = SSLModel(convnet(3, 8, [6]), mlp(6, 7, 2, 5))
    model.projector[1].eval()
    modes = [module.training for module in model.modules()]
    with suppress(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_count_parameters_counts_entries() -> None:
    assert count_parameters(mlp(6, 7, 2, 5)) == 6 * 7 + 7 + 7 + 7 * 5
    assert count_parameters(identity(6)) == 0
