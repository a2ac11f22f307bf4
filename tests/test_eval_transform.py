"""`dataset.eval_resize` and `dataset.eval_crop`: evaluation images, and views of whole images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import ssl_runner
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.eval_transform import EvalTransform
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.data.preview import preview
from ssl_runner.embedding_map import pixels
from ssl_runner.errors import UsageError
from ssl_runner.evaluation import embed_cli, probe_cli
from ssl_runner.evaluation.embed import data_set_batches
from ssl_runner.evaluation.finished import compose_groups, config_of, read_data
from ssl_runner.runs.files import write_json
from ssl_runner.runs.weights import read_header
from ssl_runner.views import Augment, ViewFormat, normalize, to_unit
from tests.helpers import CPU, load, make_pictures, run_folder, run_script, table, toy

BICUBIC = v2.InterpolationMode.BICUBIC


def natural(n: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth images with some noise, (n, channels, height, width) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand(smooth.shape, generator=generator)
    return (255 * (0.8 * smooth + 0.2 * noise)).to(torch.uint8)


@pytest.mark.parametrize(
    ("shape", "resize", "crop"),
    [((96, 96), 70, 64), ((96, 96), None, 64), ((96, 96), 64, None), ((32, 48), 40, 31), ((9, 9), 9, 9)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_eval_transform_equals_resize_and_center_crop_of_pillow_images(
    shape: tuple[int, int], resize: int | None, crop: int | None, channels: int
) -> None:
    images = natural(4, channels, *shape)
    steps = [v2.Resize(resize, BICUBIC)] if resize else []
    reference = v2.Compose([*steps, *([v2.CenterCrop(crop)] if crop else [])])
    result = EvalTransform(resize, crop)(images)
    assert result.dtype == torch.uint8
    for image, original in zip(result, images, strict=True):
        picture = reference(Image.fromarray(original.permute(1, 2, 0).squeeze().numpy()))
        expected = torch.from_numpy(np.array(picture)).reshape(*picture.size[::-1], channels).permute(2, 0, 1)
        difference = (image.int() - expected.int()).abs()  # Pillow computes with fixed-point weights
        assert difference.max() <= (2 if resize else 0)
        assert (difference == 0).float().mean() > 0.99


class BicubicDevices(TorchDispatchMode):
    """Records the devices of antialiased bicubic interpolations."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "bicubic" in str(func):
            self.devices.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_resize_of_images_on_mps_is_computed_on_the_cpu() -> None:
    """MPS has no antialiased bicubic interpolation in the oldest versions of torch."""
    with FakeTensorMode(), BicubicDevices() as bicubic:
        images = torch.empty(2, 3, 12, 12, dtype=torch.uint8, device="mps")
        result = EvalTransform(10)(images)
    assert (result.device.type, result.shape) == ("mps", (2, 3, 10, 10))
    assert bicubic.devices == ["cpu", "cpu"]


def noisy(storage: str = "auto", resize: int | None = 10, crop: int | None = 8) -> DataSet:
    """The toy data set, with 5 unlabelled images, of 12 x 12 pixels, evaluated at 8 x 8 pixels."""
    source = toy(unlabeled=5, side=12)
    source.images = natural(len(source.images), 3, 12, 12)
    return load(source, storage=storage).with_transform(resize, crop)


@pytest.mark.parametrize("storage", ["device", "host"])
def test_evaluation_splits_are_transformed_and_pretraining_images_are_not(storage: str) -> None:
    data = noisy(storage)
    assert (data.stored_size, data.image_size, data.view_size) == (12, 8, 8)
    for split in ("train", "val", "test", "pretrain"):
        images = data.evaluation(split)
        stored = images.images[images.indices]
        [(batch, _)] = images.batches(torch.arange(len(images)), len(images), CPU)
        assert torch.equal(batch, EvalTransform(10, 8)(stored))
        [(batch, _)] = images.stored.batches(torch.arange(len(images)), len(images), CPU)
        assert torch.equal(batch, stored)
        assert getattr(data, split).transform == (None if split == "pretrain" else EvalTransform(10, 8))
    every = torch.cat([x for x, _ in data_set_batches(data, 100)])
    rows = torch.cat([part.indices for part in (data.train, data.val, data.test)])
    rows = torch.cat([rows, data.pretrain.indices[data.pretrain.y < 0]])
    expected = EvalTransform(10, 8)(data.train.images[rows])
    assert torch.equal(every, normalize(to_unit(expected), data.mean, data.std))
    assert np.array_equal(
        pixels(data.test, 2),
        EvalTransform(10, 8)(data.test.images[data.test.indices[2:3]])[0].permute(1, 2, 0),
    )


def test_views_are_cut_from_stored_images_at_the_evaluation_size(tmp_path: Path) -> None:
    data, augment = noisy(), Augment({"all": {"crop": {"scale": [0.2, 1.0]}, "flip": 0.5}})
    loader = MultiViewLoader(data, augment, V=2, batch_size=20, seed=0)
    X, batch = next(loader.batches(0))
    stored = data.train.images[batch.indices]
    views = torch.Generator().manual_seed(0)
    assert torch.equal(X, augment(stored, 2, data.mean, data.std, views, view_format=ViewFormat(8)))
    fixed, _ = loader.fixed_batch(data.train, torch.arange(5))
    stored = data.train.images[data.train.indices[:5]]
    views = torch.Generator().manual_seed(0)
    assert torch.equal(fixed, augment(stored, 2, data.mean, data.std, views, view_format=ViewFormat(8)))
    preview(loader, tmp_path / "views.png", "views=crop")
    assert (tmp_path / "views.png").exists()


def test_data_set_without_eval_options_is_unchanged() -> None:
    data = noisy(resize=None, crop=None)
    assert (data.transform, data.view_size, data.image_size) == (None, None, 12)
    assert all(getattr(data, split).transform is None for split in ("pretrain", "train", "val", "test"))


def test_crop_larger_than_the_images_is_refused(ssl_run) -> None:
    with pytest.raises(UsageError, match=r"dataset.eval_crop=13: expected at most 12, the shorter side"):
        noisy(resize=None, crop=13)
    code, out, err = ssl_run("dataset.eval_resize=20 dataset.eval_crop=24")
    assert (code, out) == (1, "")
    assert err == "dataset.eval_crop=24: expected at most dataset.eval_resize=20; use a smaller crop\n"


RUN = (
    "dataset=folder dataset.root=pictures dataset.cache=cache dataset.eval_resize=18 dataset.eval_crop=16"
    " dataset.val_fraction=0.2 epochs=1 batch_size=10 views=crop backbone.widths=[8,16] projector.width=8"
    " projector.K=4 probe.probes=[knn] probe.features=[backbone] diagnostics.num_images=8 device=cpu"
    " precision=fp32 embedding.method=none"
)


def test_run_probe_embed_and_load_use_the_same_evaluation_images(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", train=15, test=5, side=24)
    (tmp_path / "pictures" / "unlabeled").mkdir()
    for number, image in enumerate(natural(4, 3, 24, 24)):
        path = tmp_path / "pictures" / "unlabeled" / f"{number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    code, out, err = ssl_run(RUN)
    assert code == 0, err
    folder = run_folder(out)
    header = read_header(folder / "backbone.safetensors")
    assert header is not None
    sizes = [header[name] for name in ("image_size", "stored_size", "eval_resize", "eval_crop")]
    assert sizes == [16, 24, 18, 16]

    model, transform = ssl_runner.load(folder)
    command = [str(folder), "-o", "features.npz"]
    code, _, err = run_script(embed_cli.main, command, monkeypatch, capsys)
    assert code == 0, err
    written = np.load("features.npz")
    assert {*written["split"]} == {"train", "val", "test", "unlabeled"}
    for features, path in zip(written["features"], written["path"], strict=True):
        with Image.open(tmp_path / "pictures" / path) as image, torch.no_grad():
            x = transform(image)
        pil = v2.Compose([v2.Resize(18, BICUBIC), v2.CenterCrop(16)])(
            Image.open(tmp_path / "pictures" / path)
        )
        pil = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
        shown = (x * transform.std[:, None, None] + transform.mean[:, None, None]) * 255
        assert (shown - pil).abs().max() < 2.01
        with torch.no_grad():
            assert np.allclose(model(x[None])[0].numpy(), features, atol=1e-5)

    own = table(folder / "probe.csv")
    code, out, err = run_script(probe_cli.main, [str(folder)], monkeypatch, capsys)
    assert code == 0, err
    again = table(folder / "probe.csv")[len(own) :]
    assert [row["top1"] for row in again] == [row["top1"] for row in own]
    words = f"dataset=folder dataset.root={tmp_path}/pictures dataset.cache=cache dataset.val_fraction=0.2"
    other = [str(folder), *words.split()]
    code, out, err = run_script(probe_cli.main, other, monkeypatch, capsys)
    assert code == 0, err  # the size and the evaluation transform are those of the run
    assert table(folder / "probe.csv")[-1]["dataset"] == "folder"
    again = table(folder / "probe.csv")[2 * len(own) :]
    assert [row["top1"] for row in again] == [row["top1"] for row in own]
    data_sets_of_a_run_with_an_evaluation_transform(folder, tmp_path)


def data_sets_of_a_run_with_an_evaluation_transform(folder: Path, tmp_path: Path) -> None:
    """Options of the transform that are given replace those of the run, and name another data set."""
    _, transform = ssl_runner.load(folder)
    whole = natural(24, 3, 24, 24)
    for root, images in (("square", whole), ("oblong", natural(24, 3, 30, 26))):
        for number, image in enumerate(images):
            path = tmp_path / root / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)

    def read(*settings: str) -> tuple[DataSet, Tensor]:
        cfg = config_of(folder, list(settings))
        data = read_data(cfg, transform, CPU)
        [(pixels, _)] = data.train.batches(torch.arange(len(data.train)), 100, CPU)
        return data, pixels

    whole = torch.cat([whole[::2], whole[1::2]])  # in the order of the classes
    square, given = f"dataset.root={tmp_path}/square", ("dataset.eval_resize=null", "dataset.eval_crop=null")
    data, pixels = read(square)
    assert torch.equal(pixels, EvalTransform(18, 16)(whole[data.train.indices]))
    data, pixels = read(square, "dataset.eval_resize=20")
    assert torch.equal(pixels, EvalTransform(20, 16)(whole[data.train.indices]))
    assert data.name == f"folder:eval_resize=20,root={tmp_path}/square"
    data, pixels = read(square, "dataset.size=16", *given)
    assert (data.transform, data.stored_size) == (None, 16)
    for settings in (
        (),
        ("dataset=folder", "dataset.val_fraction=0.2"),
    ):  # without a transform, the size of the input
        assert torch.equal(read(square, *settings, *given)[1], pixels)
    data, _ = read(f"dataset.root={tmp_path}/oblong")  # resized to the size of the stored images
    assert (data.transform, data.stored_size) == (EvalTransform(18, 16), 24)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ("", "folder"),
        ("dataset=folder dataset.root={root}", "folder"),
        ("dataset=folder dataset.root={root} dataset.eval_resize=18 dataset.eval_crop=16", "folder"),
        ("dataset.eval_resize=20", "folder:eval_resize=20"),
        ("dataset.eval_resize=null", "folder:eval_resize=null"),
        ("dataset.size=20", "folder:size=20"),
        ("dataset.size=20 dataset.storage=host", "folder:size=20"),
        ("dataset.eval_resize=null dataset.eval_crop=null", "folder:eval_resize=null,eval_crop=null"),
        ("dataset=cifar10", "cifar10"),
        ("dataset=cifar10 dataset.eval_crop=15", "cifar10:eval_resize=null,eval_crop=15"),
        ("dataset=cifar10 dataset.size=20", "cifar10:size=20"),
    ],
)
def test_name_of_a_data_set_lists_options_of_another_evaluation_transform(
    settings: str, name: str, tmp_path: Path
) -> None:
    root = tmp_path / "pictures"
    saved = compose_groups(
        ["dataset=folder", f"dataset.root={root}", "dataset.eval_resize=18", "dataset.eval_crop=16"], None
    )
    folder = finished_run(tmp_path, saved, "folder")
    assert config_of(folder, settings.format(root=root).split()).dataset.name == name


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ("dataset.eval_crop=16", "folder:eval_crop=16"),
        ("dataset.test_fraction=0.2", "folder:test_fraction=0.2"),
        ("dataset.size=16", "folder"),  # the size that the network takes
    ],
)
def test_name_lists_options_that_did_not_exist_when_the_run_was_made(
    settings: str, name: str, tmp_path: Path
) -> None:
    saved = compose_groups(["dataset=folder", f"dataset.root={tmp_path}"], None)
    with open_dict(saved):
        for key in ("eval_resize", "eval_crop", "test_fraction"):
            del saved.dataset[key]
    assert config_of(finished_run(tmp_path, saved, "folder"), [settings]).dataset.name == name


def finished_run(folder: Path, config: DictConfig, dataset: str) -> Path:
    """Write the files of a finished run that `config_of` reads. Returns its folder."""
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    choices = {
        "hydra": {"runtime": {"choices": {"dataset": dataset, "probe": "default"}, "config_sources": []}}
    }
    OmegaConf.save(choices, folder / ".hydra" / "hydra.yaml")
    of_process = {"host": "elsewhere", "pid": 1, "process_started": 0.0}
    write_json(folder / "run.json", {"status": "done", "identity": "x", "cwd": str(folder), **of_process})
    return folder
