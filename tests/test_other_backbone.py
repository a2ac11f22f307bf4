"""The advice on weights of another backbone names the options that a run lacks, and only those."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import nn

from ssl_runner.runs.other_backbone import advice, option_lines

OPTIONS = ["backbone=mine", "+backbone.drop=0.1"]


def network(
    channels: int, image_size: int, width: int = 4, drop: float = 0.0, bias: bool = True
) -> nn.Module:
    return nn.Conv2d(channels, width, 3, bias=bias)


def header(target: str, size: int = 28, lines: list[str] | None = None, **settings: Any) -> Mapping[str, Any]:
    backbone = {"_target_": target, **settings}
    return {"backbone": backbone, "channels": 1, "image_size": size} | ({"options": lines} if lines else {})


CONVNET, LINEAR, RESNET = (f"ssl_runner.backbone.{name}" for name in ("convnet", "linear", "resnet"))
OWN, UNKNOWN = f"{__name__}.network", "nowhere.network"
CASES = {  # ours, theirs, what is set
    "one of two": (
        header(CONVNET, 20, widths=[4, 9]),
        header(CONVNET, widths=[4, 8]),
        "set backbone.widths=[4,8]",
    ),
    "size": (header(LINEAR, 20, width=4), header(LINEAR, width=4), "set dataset.size=28"),
    "both": (header(LINEAR, 9, width=4), header(LINEAR, width=5), "set backbone.width=5 dataset.size=28"),
    "another choice": (
        header(CONVNET, 20, widths=[4]),
        header(LINEAR, width=4),
        "set backbone=linear dataset.size=28",
    ),
    "another name": (
        header(RESNET, name="resnet18", stem="auto"),
        header(RESNET, lines=["backbone=resnet50"], name="resnet50", stem="pool"),
        "set backbone=resnet50",
    ),
    "added": (header(OWN), header(OWN, width=5, drop=0.1), "set +backbone.width=5"),
    "ours is added": (header(OWN, width=5, drop=0.1), header(OWN), "leave out backbone.width"),
    "two kinds": (
        header(OWN, bias=False),
        header(OWN, width=5),
        "set +backbone.width=5 and leave out backbone.bias",
    ),
    "own choice": (
        header(CONVNET),
        header(UNKNOWN, lines=OPTIONS, drop=0.1),
        "set backbone=mine +backbone.drop=0.1",
    ),
    "of an earlier version": (header(CONVNET), header(UNKNOWN), f"set backbone._target_={UNKNOWN}"),
}


@pytest.mark.parametrize(("ours", "theirs", "todo"), CASES.values(), ids=CASES)
def test_advice_names_the_options_that_change_a_tensor(ours: Mapping, theirs: Mapping, todo: str) -> None:
    assert str(advice(ours, theirs)).endswith(f"; {todo}")


def test_options_that_change_no_tensor_are_not_the_reason() -> None:
    pretrained = header(RESNET, 32, name="resnet18", stem="auto", weights="DEFAULT")
    assert advice(header(RESNET, 28, name="resnet18", stem="auto"), pretrained) is None
    assert advice(header(OWN), header(OWN, 9, drop=0.5)) is None


def test_function_that_only_the_file_names_is_not_called() -> None:
    """A relation to images of another size remains unknown."""
    assert "dataset.size=9" in str(advice(header(CONVNET), header("os.getcwd", 9)))


FILES = {  # of a backbone -> the lines for width 8 and bias true
    "width: ${projector.width}\nbias: true": ["backbone=mine", "backbone.width=8"],
    "width: 8": ["backbone=mine", "+backbone.bias=true"],
    "defaults: [other]\nwidth: 8": ["backbone=mine", "++backbone.bias=true"],
}


@pytest.mark.parametrize("file", FILES)
def test_lines_set_what_the_file_of_a_backbone_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.yaml").write_text(file)
    sources = [{"provider": "command-line", "path": str(tmp_path)}]
    hydra = {"runtime": {"choices": {"backbone": "mine"}, "config_sources": sources}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra))
    assert option_lines(OmegaConf.create({"width": 8, "bias": True})) == FILES[file]
