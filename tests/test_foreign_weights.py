"""`init_weights` from checkpoints of other libraries: which tensors are found, and what the line says."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from ssl_runner import backbone
from ssl_runner.errors import UsageError
from ssl_runner.runs import checkpoint, weights
from tests.helpers import TINY, run_folder

State = dict[str, Tensor]


def body() -> nn.Sequential:
    """A network with named children, 14 tensors."""
    block = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    layers = {"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(), "layer1": block}
    return nn.Sequential(OrderedDict(layers))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """The same names and shapes with other values."""
    return {name: tensor + 1 for name, tensor in state.items()}


HEAD = {
    "projector.0.weight": torch.ones(5, 8),
    "projector.1.weight": torch.ones(8),
    "queue": torch.ones(2, 3),
}
POSITIONS = {"conv1": "0", "bn1": "1", "layer1": "3"}  # 2 is the ReLU


def by_position(state: State) -> State:
    return {
        f"{POSITIONS[first]}.{rest}": t for name, t in state.items() for first, rest in [name.split(".", 1)]
    }


CHECKPOINTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "torchvision": (lambda s: s | {"fc.weight": torch.ones(9, 8), "fc.bias": torch.ones(9)}, "; ignored: 2"),
    "data parallel": (lambda s: prefixed("module.", s), " (prefix module.)"),
    "MoCo": (
        lambda s: {
            "epoch": 3,
            "arch": "resnet50",
            "state_dict": prefixed("module.encoder_q.", s)
            | prefixed("module.encoder_k.", other(s))
            | prefixed("module.", HEAD),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]},
        },
        " (key state_dict, prefix module.encoder_q.); ignored: 17",
    ),
    "solo-learn": (
        lambda s: {
            "pytorch-lightning_version": "2.0",
            "state_dict": prefixed("momentum_backbone.", other(s)) | prefixed("backbone.", s) | HEAD,
            "hyper_parameters": {"lr": 0.3},
        },
        " (key state_dict, prefix backbone.); ignored: 17",
    ),
    "lightly": (
        lambda s: {"state_dict": prefixed("backbone.", by_position(s)) | HEAD},
        " (key state_dict, prefix backbone., children by position); ignored: 3",
    ),
    "DINO": (
        lambda s: {
            "student": prefixed("module.backbone.", other(s)) | HEAD,
            "teacher": prefixed("backbone.", s) | HEAD,
        },
        " (key teacher, prefix backbone.); ignored: 3",
    ),
    "timm": (lambda s: {"arch": "net", "state_dict": other(s), "state_dict_ema": s}, " (key state_dict_ema)"),
    "nested": (
        lambda s: {"classy": {"base_model": {"model": {"trunk": prefixed("_orig_mod.", s), "heads": HEAD}}}},
        " (key classy.base_model.model.trunk, prefix _orig_mod.)",
    ),
    "half precision": (lambda s: {"model": {n: t.half() for n, t in s.items()}}, " (key model)"),
}


@pytest.mark.parametrize("origin", CHECKPOINTS)
def test_checkpoint_of_other_library_is_found(origin: str, tmp_path: Path) -> None:
    wrap, line = CHECKPOINTS[origin]
    trained, network = body(), backbone.Backbone(body(), 8)
    torch.save(wrap(trained.state_dict()), tmp_path / "model.ckpt")
    stated = weights.load_backbone(network, tmp_path / "model.ckpt")
    expected = f"init_weights: 14 of 14 tensors matched{line}"
    assert stated == (f"{expected} other tensors of the file" if "ignored" in line else expected)
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(network.body.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


def test_foreign_safetensors_without_some_tensors(tmp_path: Path) -> None:
    trained, network = body(), backbone.Backbone(body(), 8)
    state = trained.state_dict()
    del state["bn1.bias"]
    state["conv1.weight"] = torch.ones(4, 3, 7, 7)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in network.body.state_dict().items()}
    assert weights.load_backbone(network, tmp_path / "model.safetensors") == (
        "init_weights: 12 of 14 tensors matched; not loaded: conv1.weight (4x3x7x7 in the file, 4x3x3x3 here)"
        "; not in the file: bn1.bias"
    )
    for name, tensor in network.body.state_dict().items():
        kept = name in ("conv1.weight", "bn1.bias")
        assert torch.equal(tensor, before[name] if kept else state[name])


def test_long_lists_of_tensors_are_shortened(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "a.pt")
    line = weights.load_backbone(backbone.Backbone(body(), 8), tmp_path / "a.pt")
    assert line.endswith("bn1.running_mean, bn1.running_var and 8 more")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet_of_library_gives_its_features(library: str, tmp_path: Path) -> None:
    reference = torchvision.models.resnet18() if library == "torchvision" else timm.create_model("resnet18")
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    network = backbone.resnet(3, 96, "resnet18")
    line = weights.load_backbone(network, tmp_path / "resnet18.pth")
    assert line == "init_weights: 120 of 120 tensors matched; ignored: 2 other tensors of the file"
    reference.fc = nn.Identity()
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(network.eval()(x), reference.eval()(x))
    line = weights.load_backbone(backbone.resnet(3, 32, "resnet18"), tmp_path / "resnet18.pth")
    assert (
        "119 of 120 tensors matched; not loaded: conv1.weight (64x3x7x7 in the file, 64x3x3x3 here)" in line
    )


def test_own_checkpoint_is_found(tmp_path: Path) -> None:
    trained, network = backbone.convnet(3, 8, [4, 8]), backbone.convnet(3, 8, [4, 8])
    state = {"backbone": trained.state_dict(), "projector": {"0.weight": torch.ones(4, 8)}, "epoch": 1}
    checkpoint.save(state, tmp_path)
    assert "(key backbone, prefix body.)" in weights.load_backbone(network, tmp_path / "checkpoint.pt")
    assert torch.equal(network.body[0].weight, trained.body[0].weight)


def test_files_without_this_backbone_are_refused(tmp_path: Path) -> None:
    network = backbone.Backbone(body(), 8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save(prefixed("blocks.", body().state_dict()), tmp_path / "vit.pt")
    torch.save({"bn1.num_batches_tracked": torch.tensor(3)}, tmp_path / "counter.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": body().state_dict(), "hyper": Path("a")}, tmp_path / "pickled.ckpt")
    torch.save(network, tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("no weights\n")
    (tmp_path / "zero.safetensors").touch()
    found = r"expected tensors of this backbone \(conv1.weight, conv1.bias and 12 more\), found "
    for name, message in {
        "vit.pt": found + "blocks.conv1.weight",
        "counter.pt": found + "bn1.num_batches_tracked",
        "empty.pt": found + "no tensors",
        "list.pt": found + "no tensors",
        "pickled.ckpt": r"it contains a pickled pathlib\S+\); save its state dict alone",
        "module.pt": r"it contains a pickled ssl_runner.backbone.Backbone\); save its state dict alone",
        "text.pt": "it is no archive of torch.save",
        "zero.safetensors": "it is no archive of torch.save",
    }.items():
        with pytest.raises(UsageError, match=message) as error:
            weights.load_backbone(network, tmp_path / name)
        assert "\n" not in str(error.value), name
        assert len(str(error.value)) < 400
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_projector_of_a_file_is_not_taken_for_a_backbone(tmp_path: Path) -> None:
    """The names of a Sequential are numbers, as those of a projector."""
    torch.save({"projector.1.weight": torch.ones(5, 192)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="expected tensors of this backbone"):
        weights.load_backbone(backbone.linear(3, 8, 5), tmp_path / "a.pt")


def test_run_states_what_init_weights_loaded(ssl_run, tmp_path: Path) -> None:
    network = backbone.convnet(1, 28, [8, 16]).body
    torch.save({"state_dict": prefixed("backbone.", network.state_dict())}, tmp_path / "model.ckpt")
    few = f"{TINY} epochs=1 diagnostics.every=0"
    code, out, err = ssl_run(f"{few} init_weights={tmp_path}/model.ckpt")
    assert (code, err) == (0, "")
    assert out.startswith(
        "init_weights: 12 of 12 tensors matched (key state_dict, prefix backbone.)\nmnist5k"
    )
    own = run_folder(out) / "backbone.safetensors"
    assert ssl_run(f"{few} init_weights={own}")[1].startswith("init_weights: 12 of 12 tensors matched\n")
