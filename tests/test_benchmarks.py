"""Tests of the benchmark harness and its counters. Nothing is timed, and no peer library is required."""

import ast
import json
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import __main__ as bench
from benchmarks import measure, paper, race
from ssl_runner.backbone import resnet
from ssl_runner.errors import UsageError

CPU = torch.device("cpu")


def test_interleaved_alternates_contenders_and_returns_medians() -> None:
    calls: list[str] = []
    pauses = iter([0.0, 0.0, 0.2, 0.0])  # warm-up, then three rounds

    def uneven() -> None:
        calls.append("uneven")
        time.sleep(next(pauses))

    times = measure.interleaved({"uneven": uneven, "even": lambda: calls.append("even")}, CPU, budget=0.0)
    assert calls == ["uneven", "even"] * 4
    assert times["uneven"] < 0.1  # the median ignores one slow round
    assert measure.versus({"ours": 2.0, "theirs": 6.0}) == {"ours": 1.0, "theirs": 3.0}


@pytest.mark.skipif(measure.sys.platform != "linux", reason="reads /proc")
def test_peak_memory_includes_memory_freed_before_return() -> None:
    peak = measure.peak_memory(lambda: torch.ones(64 * measure.MIB // 4).sum(), CPU)
    assert peak == pytest.approx(64, abs=8)
    assert measure.peak_memory(lambda: None, CPU) < 8


def test_groups_have_modules() -> None:
    assert all(find_spec(f"benchmarks.{name}") for name in bench.GROUPS)


def test_peers_are_imported_only_where_they_are_timed() -> None:
    """A group without peers, and a part of another group, run without the libraries that it does not time."""
    peers = {name for names in bench.PEERS.values() for name in names}
    for path in Path(bench.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
                assert not {name.partition(".")[0] for name in names} & peers, path.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vews"], "GROUP=vews: expected one or more of views, loss"),
        (["race"], "GROUP=race: expected --data; give --data FOLDER"),
        (["views", "--experiment", "supcon"], "--experiment=supcon: expected the group race; leave it out"),
        (["views", "--seconds", "0"], "--seconds=0.0: expected a number > 0"),
        pytest.param(
            ["views", "--device", "cuda"],
            "--device=cuda: expected a machine with a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without CUDA"),
        ),
    ],
)
def test_command_rejects_invalid_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_command_names_missing_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "growth", "views"])
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 2
    assert "GROUP=growth views: kornia not found; run scripts/bench" in capsys.readouterr().err


def test_counted_matches_flops_of_convolutions() -> None:
    """A convolution needs one multiply-add per output element and weight of its filter.

    The backward pass needs as many for the gradient of the weights and again for that of the input. The first
    layer does not compute the latter.
    """
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


def test_seconds_of_race_set_budget_and_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default ours trains for a third of the peers' time; with `seconds` all train equally long."""
    calls: list[tuple[Any, ...]] = []

    def racer(
        tool: str, loss: str, seed: int, seconds: float, marks: list[float], **given: Any
    ) -> list[dict]:
        calls.append((tool, seconds, marks, given.get("experiment")))
        return [{"images": 512}]

    monkeypatch.setattr(race, "racer", racer)
    race.run(CPU, False, tmp_path, tmp_path)
    assert calls[:2] == [("ours", 20, [10, 20], None), ("lightly", 60, [20, 60], None)]
    calls.clear()
    race.run(CPU, False, tmp_path, tmp_path, seconds=30, experiment="low_label")
    assert calls[:2] == [("ours", 30, [15, 30], "low_label"), ("lightly", 30, [10, 30], None)]
    with pytest.raises(UsageError, match=r"alpha is an option of loss=.*, not of loss=simclr"):
        race.run(CPU, False, tmp_path, tmp_path, experiment="cifar10_vicreg")


def test_race_counts_views_of_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[str], **given: Any) -> SimpleNamespace:
        task = json.loads(command[-1])
        Path(task["out"]).write_text(json.dumps([{"seconds": 2.0, "images": 10, "V": 8}]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(race.subprocess, "run", child)
    [row] = race.racer("ours", "simclr", 0, 2.0, [2.0])
    assert row["views_per_s"] == 40
