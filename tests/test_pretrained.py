"""`ssl_runner.load`: the features of a run's probes, from its folder alone."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import ssl_runner
from ssl_runner import backbone, projector
from ssl_runner.build import build
from ssl_runner.data import readers
from ssl_runner.errors import UsageError
from ssl_runner.pretrained import Transform
from ssl_runner.probe.protocol import extract
from ssl_runner.runs import filenames, weights
from ssl_runner.views import normalize, to_unit
from tests.helpers import TINY, make_pictures, run_folder

PAGE = (Path(__file__).parent.parent / "docs" / "weights.md").read_text()
PROGRAMS = dict(re.findall(r'```python title="(\S+)"\n(.*?)```', PAGE, re.DOTALL))

CONVNET = {"_target_": "ssl_runner.backbone.convnet", "widths": [4, 8]}
MLP = {"_target_": "ssl_runner.projector.mlp", "width": 6, "depth": 2, "K": 5}


def train(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Take two SGD steps on noise: weights and batch-norm statistics differ from their initial values."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(4, *shape)).square().mean().backward()
        optimizer.step()
    return network.eval()


def export(folder: Path, node: dict[str, Any] = CONVNET, image_size: int = 8, channels: int = 3) -> nn.Module:
    """Train and export a backbone and an MLP. Returns both as one network in eval mode."""
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    body = getattr(backbone, node["_target_"].rpartition(".")[2])(channels, image_size, **arguments)
    head = projector.mlp(body.width, width=6, depth=2, K=5)
    network = train(nn.Sequential(body, head), (channels, image_size, image_size))
    header = {
        "backbone": node,
        "projector": MLP,
        "channels": channels,
        "image_size": image_size,
        "mean": [0.5] * channels,
        "std": [0.25] * channels,
    }
    folder.mkdir(exist_ok=True)
    weights.export(body, folder / filenames.BACKBONE, header)
    weights.export(head, folder / filenames.PROJECTOR, header)
    return network


def run_programs(
    folders: dict[str, Path], x: dict[str, Tensor], patch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Run programs of docs/weights.md, each in its folder, without ssl_runner, which cannot be imported.

    Returns the features of x by the model of each program.
    """
    for module in [name for name in sys.modules if name.partition(".")[0] == "ssl_runner"]:
        patch.delitem(sys.modules, module)
    patch.setitem(sys.modules, "ssl_runner", None)
    features, printed = {}, io.StringIO()
    for name, folder in folders.items():
        names: dict[str, Any] = {}
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), torch.no_grad():
            exec(PROGRAMS[name], names)
            features[name] = names["model"](x[name])
    assert not [name for name in sys.modules if name.startswith("ssl_runner.")]
    assert (printed.getvalue() == "['fc.weight', 'fc.bias']\n") == ("torchvision_resnet.py" in folders)
    return features


def test_exported_backbones_load_without_ssl_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resnet18 = {"_target_": "ssl_runner.backbone.resnet", "name": "resnet18"}
    nodes: dict[str, tuple[dict[str, str], int]] = {
        "torchvision_resnet.py": (resnet18, 96),
        "torchvision_small.py": (resnet18, 32),
        "timm_vit.py": ({"_target_": "ssl_runner.backbone.vit_tiny"}, 96),
    }
    folders = {program: tmp_path / program for program in nodes}
    networks = {program: export(folders[program], *nodes[program]) for program in nodes}
    x = {program: torch.randn(3, 3, side, side) for program, (_, side) in nodes.items()}
    with monkeypatch.context() as patch:
        actual = run_programs(folders, x, patch)
    for program, network in networks.items():
        with torch.no_grad():
            expected = network[0](x[program])
        torch.testing.assert_close(actual[program], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name"), [("torchvision_resnet.py", "resnet18"), ("timm_vit.py", "vit_tiny")]
)
def test_backbone_of_a_run_loads_without_ssl_runner(
    program: str, name: str, ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch from the command line. The expected weights are those of checkpoint.pt."""
    make_pictures(tmp_path / "images", train=20, test=2, side=96)
    code, out, err = ssl_run(
        f"dataset=folder dataset.root={tmp_path}/images dataset.cache={tmp_path} backbone={name} epochs=1"
        " batch_size=9 diagnostics.every=0 probe.probes=[knn] probe.features=[backbone] device=cpu"
        " embedding.method=none"
    )
    assert (code, err) == (0, "")
    settings = {"name": name} if name == "resnet18" else {}
    network = getattr(backbone, name.replace("18", ""))(3, 96, **settings)
    network.load_state_dict(torch.load(run_folder(out) / "checkpoint.pt", weights_only=True)["backbone"])
    x = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        expected = network.eval()(x)
    with monkeypatch.context() as patch:
        actual = run_programs({program: run_folder(out)}, {program: x}, patch)
    torch.testing.assert_close(actual[program], expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_of_the_page_is_that_of_load(tmp_path: Path) -> None:
    export(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    inside, outside = {}, {}
    with contextlib.chdir(tmp_path):
        Path("run").symlink_to(".")
        exec(PROGRAMS["load.py"], inside)
        exec(PROGRAMS["preprocess.py"], outside)
    with torch.no_grad():
        torch.testing.assert_close(inside["features"], inside["model"](outside["x"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_projector", [False, True])
def test_load_returns_features_of_run_probes(ssl_run, with_projector: bool) -> None:
    folder = run_folder(ssl_run(TINY)[1])
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    cfg.init_weights = str(folder / "backbone.safetensors")
    experiment = build(cfg)
    data, network = experiment.data, experiment.model.backbone
    if with_projector:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["projector"]
        experiment.model.projector.load_state_dict(state)
        network = nn.Sequential(network, experiment.model.projector)
    expected = extract(network, data.test, data.mean, data.std)[:20]

    before = torch.get_rng_state()
    model, transform = ssl_runner.load(folder, with_projector=with_projector)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    images = data.test.images[data.test.indices[:20]]
    for convert in (
        lambda x: x,
        lambda x: x[0].numpy(),
        lambda x: x.movedim(0, -1).numpy(),
        lambda x: Image.fromarray(x[0].numpy()),
        lambda x: Image.fromarray(x[0].numpy()).convert("RGB"),
    ):
        with torch.no_grad():
            actual = model(torch.stack([transform(convert(image)) for image in images]))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_load_reads_image_files_as_the_run_did(ssl_run, tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", train=8, test=3, side=12)
    for number, file in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        with Image.open(file) as image:
            image.resize((12 + number, 20)).save(file)
    dataset = f"dataset=folder dataset.root={tmp_path}/images dataset.size=8 dataset.val_fraction=0.3"
    few = TINY.replace("dataset.subset=200", "").replace("batch_size=50", "batch_size=5")
    code, out, err = ssl_run(f"{few} {dataset} epochs=1 dataset.cache={tmp_path}/cache diagnostics.every=0")
    assert (code, err) == (0, "")
    cfg = OmegaConf.load(run_folder(out) / ".hydra" / "config.yaml")
    data = build(cfg).data
    model, transform = ssl_runner.load(str(run_folder(out) / "backbone.safetensors"))
    expected = extract(model, data.test, data.mean, data.std)
    files = sorted((tmp_path / "images" / "test").rglob("*.png"))
    with torch.no_grad():
        actual = model(torch.stack([transform(Image.open(file)) for file in files]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_load_resizes_published_images_as_the_run_did(ssl_run, channels: int) -> None:
    options = f"dataset.size=20 dataset.channels={channels} epochs=1 diagnostics.every=0"
    code, out, err = ssl_run(f"{TINY} {options}")
    assert (code, err) == (0, "")
    data = build(OmegaConf.load(run_folder(out) / ".hydra" / "config.yaml")).data
    _, transform = ssl_runner.load(run_folder(out))
    expected = normalize(to_unit(data.test.images), data.mean, data.std)
    for image, original in zip(expected[:300], readers.mnist5k().images, strict=False):
        assert torch.equal(transform(original), image)
        assert torch.equal(transform(Image.fromarray(original[0].numpy())), image)


def test_load_rebuilds_settings_and_width(tmp_path: Path) -> None:
    network = export(tmp_path)
    model, transform = ssl_runner.load(tmp_path)
    assert (model.image_size, model.channels, model.settings["backbone"]) == (8, 3, CONVNET)
    assert (transform.image_size, transform.channels) == (8, 3)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(model(x), network[0](x), rtol=0, atol=0)
    embed, _ = ssl_runner.load(tmp_path, with_projector=True)
    torch.testing.assert_close(embed(x), network(x), rtol=0, atol=0)


def test_embeddings_without_projector_are_the_features(tmp_path: Path) -> None:
    export(tmp_path)
    model, _ = ssl_runner.load(tmp_path)
    header = model.settings | {"projector": None}
    (tmp_path / "alone").mkdir()
    weights.export(model.backbone, tmp_path / "alone" / filenames.BACKBONE, header)
    embed, _ = ssl_runner.load(tmp_path / "alone", with_projector=True)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(embed(x), model(x), rtol=0, atol=0)


def test_load_downloads_no_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of a run that began with pretrained weights would download them again."""
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **kwargs: pytest.fail("download"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for node in (
        {"_target_": "ssl_runner.backbone.resnet", "name": "resnet18", "weights": "DEFAULT"},
        {"_target_": "ssl_runner.backbone.from_timm", "name": "resnet10t", "pretrained": True},
    ):
        plain = {key: value for key, value in node.items() if key not in ("weights", "pretrained")}
        export(tmp_path, plain, image_size=32)
        header = weights.read_header(tmp_path / filenames.BACKBONE) | {"backbone": node}
        file = tmp_path / filenames.BACKBONE
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file(tensors, file, {weights.HEADER: json.dumps(header)})
        state = ssl_runner.load(file)[0].backbone.body.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_load_accepts_files_with_body_prefix(tmp_path: Path) -> None:
    network = export(tmp_path)
    file = tmp_path / filenames.BACKBONE
    header = weights.read_header(file)
    del header["projector"]  # as earlier versions wrote it
    names = {name: tensor.contiguous() for name, tensor in network[0].state_dict().items()}
    safetensors.torch.save_file(names, file, {"ssl_runner": json.dumps(header)})
    assert all(name.startswith("body.") for name in names)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(ssl_runner.load(file)[0](x), network[0](x), rtol=0, atol=0)
    other = backbone.convnet(3, 8, [4, 8])
    weights.load_backbone(other, file)
    torch.testing.assert_close(other.eval()(x), network[0](x), rtol=0, atol=0)
    with pytest.raises(UsageError, match="expected a run that exported its projector"):
        ssl_runner.load(file, with_projector=True)


def test_custom_backbone_keeps_its_names(tmp_path: Path) -> None:
    class Custom(backbone.Backbone):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), 2)
            self.body.scale = nn.Parameter(torch.ones(2))
            self.offset = nn.Parameter(torch.ones(2))

    weights.export(Custom(), tmp_path / "a.safetensors", {})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == {"body.scale", "offset"}
    weights.load_backbone(Custom(), tmp_path / "a.safetensors")


def test_module_without_tensors_writes_no_file(tmp_path: Path) -> None:
    weights.export(nn.Identity(), tmp_path / "projector.safetensors", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_mode_of_exported_files_follows_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        export(tmp_path)
    finally:
        os.umask(before)
    for name in (filenames.BACKBONE, filenames.PROJECTOR):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_load_refuses_other_files(tmp_path: Path) -> None:
    export(tmp_path)
    (tmp_path / "text").write_text("no weights")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").mkdir()
    wrong = weights.read_header(tmp_path / filenames.BACKBONE)
    wrong["backbone"] = {**CONVNET, "widths": [4, 9]}
    weights.export(nn.Linear(2, 2), tmp_path / "other.safetensors", wrong)
    wrong["backbone"] = {"_target_": "nowhere.network"}
    weights.export(nn.Linear(2, 2), tmp_path / "custom.safetensors", wrong)
    for name, message in {
        "missing": "missing: expected an existing file; give the folder or the backbone.safetensors",
        "empty": "backbone.safetensors: expected an existing file",
        "text": "text: expected a safetensors file",
        "foreign.safetensors": "expected weights written by ssl_runner, found no such header",
        "projector.safetensors": "expected the folder of a run or its backbone.safetensors",
        "other.safetensors": "expected the tensors of its own header",
        "custom.safetensors": "cannot rebuild the backbone nowhere.network",
    }.items():
        with pytest.raises(UsageError, match=message) as error:
            ssl_runner.load(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / filenames.PROJECTOR).unlink()
    with pytest.raises(UsageError, match=r"projector.safetensors: expected an existing file"):
        ssl_runner.load(tmp_path, with_projector=True)


@pytest.mark.parametrize("size", [(13, 9), (9, 13), (6, 6), (8, 8), (40, 31)])
def test_transform_resizes_and_crops_as_torchvision(size: tuple[int, int]) -> None:
    """Cropping before the resize differs from torchvision by at most half a pixel of the crop position."""
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    ramp = np.linspace(0, 255, size[0])[None, :, None] * np.ones((size[1], 1, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    actual = Transform(8, 3, mean, std)(image)
    resized = TF.center_crop(TF.resize(image, 8, TF.InterpolationMode.BICUBIC), [8, 8])
    expected = TF.normalize(TF.to_tensor(resized), mean.tolist(), std.tolist())
    torch.testing.assert_close(actual, expected, rtol=0, atol=25 / 255 / 0.5)
    if size[0] == size[1]:
        torch.testing.assert_close(actual, expected)


def test_transform_converts_channels() -> None:
    gray, rgb = (Transform(2, c, torch.zeros(c), torch.ones(c)) for c in (1, 3))
    color = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    luminance = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    torch.testing.assert_close(gray(color), torch.full((1, 2, 2), luminance), rtol=0, atol=1 / 255)
    torch.testing.assert_close(rgb(color[:1]), torch.full((3, 2, 2), 200 / 255))
    asymmetric = torch.tensor([[0, 10], [200, 30]], dtype=torch.uint8)
    for image in (asymmetric, asymmetric.numpy(), Image.fromarray(asymmetric.numpy())):
        torch.testing.assert_close(gray(image), asymmetric[None] / 255)
    transparent = Image.new("RGBA", (5, 3), (0, 0, 0, 0))
    torch.testing.assert_close(rgb(transparent), torch.ones(3, 2, 2))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4, 2), np.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.tensor(3, dtype=torch.uint8),
        "image.png",
    ],
    ids=["float array", "two channels", "float tensor", "batch", "number", "name"],
)
def test_transform_refuses_other_input(image: Any) -> None:
    with pytest.raises(UsageError, match="expected a PIL image, a uint8 array") as error:
        Transform(4, 3, torch.zeros(3), torch.ones(3))(image)
    assert "\n" not in str(error.value)


def test_transform_of_many_channels_takes_only_tensors_of_its_size() -> None:
    transform = Transform(4, 6, torch.zeros(6), torch.ones(6))
    assert transform(torch.full((6, 4, 4), 255, dtype=torch.uint8)).shape == (6, 4, 4)
    with pytest.raises(UsageError, match=r"expected a uint8 tensor \(6, 4, 4\)"):
        transform(Image.new("RGB", (4, 4)))
