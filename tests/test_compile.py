"""compile=true gives the same training as eager mode."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from ssl_runner.backbone import Backbone, from_timm, linear, resnet, vit_tiny
from ssl_runner.loss import Loss, SimCLR
from ssl_runner.relation.builders import FromViews
from ssl_runner.views import Augment
from tests.helpers import CPU
from tests.test_no_host_sync import LOSSES, SMALL, steps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # torch.compile's own warnings


def compare(loss: Callable[[], Loss], backbone: Callable[..., Backbone], compiler: str) -> None:
    """Assert that three training steps agree with and without the compiler.

    The later steps depend on gradients and batch statistics of the earlier ones.
    """
    torch.compiler.reset()
    views = Augment({"all": {"flip": 0.5}})
    sgd = torch.optim.SGD  # Adam amplifies rounding errors in gradients that should be zero
    plain, compiled = (
        steps(loss(), FromViews(), views, sgd, backbone, CPU, compiler=chosen) for chosen in (None, compiler)
    )
    for a, b in zip(compiled, plain, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_compile_matches_eager_for_every_loss(loss: str) -> None:
    """Uses aot_eager only: the loss is not compiled, so code generation does not depend on it."""
    compare(LOSSES[loss], SMALL, "aot_eager")


@pytest.mark.parametrize(
    ("backbone", "compiler"),
    [
        (SMALL, "inductor"),
        (partial(from_timm, name="vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2), "inductor"),
        (vit_tiny, "aot_eager"),  # without C++ code generation, which takes minutes
        (linear, "aot_eager"),
        (partial(resnet, name="resnet18"), "aot_eager"),
        (partial(resnet, name="resnet50"), "aot_eager"),
        (partial(from_timm, name="resnet10t"), "aot_eager"),
    ],
    ids=["convnet", "shallow vit", "vit_tiny", "linear", "resnet18", "resnet50", "timm"],
)
def test_compile_matches_eager_for_every_backbone(backbone: Callable[..., Backbone], compiler: str) -> None:
    compare(SimCLR, backbone, compiler)
