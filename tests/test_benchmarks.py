"""The frame of the benchmarks, and what they count. Nothing here times anything, and no peer is needed."""

import time
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from benchmarks import __main__ as bench
from benchmarks import measure, paper
from ssl_runner.backbone import resnet

CPU = torch.device("cpu")


def test_contenders_take_turns_and_give_medians() -> None:
    calls: list[str] = []
    pauses = iter([0.0, 0.0, 0.2, 0.0])  # the warm-up, then three rounds

    def uneven() -> None:
        calls.append("uneven")
        time.sleep(next(pauses))

    times = measure.interleaved({"uneven": uneven, "even": lambda: calls.append("even")}, CPU, budget=0.0)
    assert calls == ["uneven", "even"] * 4
    assert times["uneven"] < 0.1  # of one slow round the median knows nothing
    assert measure.versus({"ours": 2.0, "theirs": 6.0}) == {"ours": 1.0, "theirs": 3.0}


@pytest.mark.skipif(measure.sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_freed_again() -> None:
    peak = measure.peak_memory(lambda: torch.ones(64 * measure.MIB // 4).sum(), CPU)
    assert peak == pytest.approx(64, abs=8)
    assert measure.peak_memory(lambda: None, CPU) < 8


def test_every_group_has_its_module() -> None:
    assert all(find_spec(f"benchmarks.{name}") for name in bench.GROUPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vews"], "no group vews: choose from views, loss"),
        (["race"], "the race needs images: give --data FOLDER"),
        pytest.param(
            ["views", "--device", "cuda"],
            "this machine has no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_benchmark_that_cannot_run_says_why(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_counted_flops_are_those_of_the_convolutions() -> None:
    """A convolution multiplies and adds once for every output and weight of its own, and twice more on the way back, but for the
    gradient of the images, which nobody needs."""
    network, X = resnet(3, 32, "resnet18"), torch.randn(2, 3, 32, 32)
    forward = []

    def count(module: nn.Conv2d, args: object, out: torch.Tensor) -> None:
        forward.append(2 * out.numel() * module.weight[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    flops, moved, kernels = paper.counted(lambda: network(X).sum().backward())
    assert flops == 3 * sum(forward) - forward[0]
    assert moved > 3 * 4 * sum(parameter.numel() for parameter in network.parameters())
    assert kernels > 3 * len(forward)
