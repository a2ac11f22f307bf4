"""compile=true gives the same training as eager mode."""

from collections.abc import Callable, Sequence
from functools import partial, partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from ssl_runner import compiler
from ssl_runner.backbone import Backbone, from_timm, linear, resnet, vit_tiny
from ssl_runner.compiler import REPAID_STEPS, compile_solver
from ssl_runner.loss import Loss, SimCLR
from ssl_runner.projector import mlp
from ssl_runner.relation.builders import FromViews
from ssl_runner.views import Augment
from tests.helpers import CPU, pretraining
from tests.test_no_host_sync import LOSSES, SMALL, steps

LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # 2.6

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # torch.compile's own warnings


def compare(loss: Callable[[], Loss], backbone: Callable[..., Backbone], compiler: str) -> None:
    """Assert that three training steps agree with and without the compiler.

    The later steps depend on gradients and batch statistics of the earlier ones.
    """
    torch.compiler.reset()
    views = Augment({"all": {"flip": 0.5}})
    sgd = torch.optim.SGD  # Adam amplifies rounding errors in gradients that should be zero

    def seeded() -> Loss:  # the random numbers of a loss start at random
        torch.manual_seed(0)
        return loss()

    plain, compiled = (
        steps(seeded(), FromViews(), views, sgd, backbone, CPU, compiler=chosen)
        for chosen in (None, compiler)
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


@torch._dynamo.config.patch({LIMIT: 8})  # torch's default, which timm.optim changes
def counted_jobs(
    monkeypatch: pytest.MonkeyPatch, widths: Sequence[int], sides: Sequence[int | None]
) -> list[int]:
    """Train one epoch per width in one process, as the jobs of a sweep do. Returns compilations per job.

    The networks stay alive, since nothing says when those of a finished job are collected.
    """
    counter = CompileCounter()
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(original, backend=counter))
    counts, alive = [], []
    for width in widths:
        before = counter.frame_count
        training = pretraining(epochs=len(sides))
        alive.append(training)
        training.model.backbone = training.network.backbone = SMALL(3, 4, widths=[4, width])
        training.model.projector = mlp(width, 8, 2, 5)
        training.loader.resolutions = sides
        assert compile_solver(True, training, training.loader) == "on"
        list(training.epochs())
        counts.append(counter.frame_count - before)
    return counts


def test_every_job_of_a_process_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default dynamo compiles no ninth version of a function, and says so in a log only."""
    assert counted_jobs(monkeypatch, range(4, 15), [None]) == [1] * 11


def test_every_view_size_of_every_job_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [None, *range(6, 24, 2)]
    assert counted_jobs(monkeypatch, [4, 5, 6], sides) == [len(sides)] * 3


def test_resumed_run_is_compiled_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that remain do not decide: compiled networks round differently."""
    training = pretraining()
    training.epoch, training.loader.device = 2, torch.device("cuda")
    monkeypatch.setattr(compiler, "REPAID_STEPS", 9)
    assert compile_solver("auto", training, training.loader) == "on"
    monkeypatch.setattr(compiler, "REPAID_STEPS", 10)
    assert compile_solver("auto", training, training.loader) == "off"
    assert compile_solver("auto", training, training.loader, before="on") == "on"


@pytest.mark.parametrize(
    ("compile", "device", "steps", "ranks", "expected"),
    [
        ("auto", "cpu", 10**9, 1, "off"),
        ("auto", "mps", 10**9, 1, "off"),
        ("auto", "cuda", REPAID_STEPS - 1, 1, "off"),
        ("auto", "cuda", REPAID_STEPS, 1, "on"),
        ("auto", "cuda", REPAID_STEPS, 2, "off"),  # synchronised batch norm ends compiled parts
        (True, "cuda", 1, 2, "on"),
        (True, "cpu", 1, 1, "on"),
        (False, "cuda", 10**9, 1, "off"),
        ("graphs", "cuda", 1, 1, "graphs"),
    ],
)
def test_auto_compiles_on_cuda_if_the_run_is_long_enough(
    compile: str | bool, device: str, steps: int, ranks: int, expected: str
) -> None:
    assert compiler.choose(compile, torch.device(device), steps, ranks) == expected
