"""ssl-embed: files of features equal the features in memory, for data sets and folders of images."""

import gc
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from ssl_runner.backbone import convnet
from ssl_runner.errors import UsageError
from ssl_runner.evaluation import embed, embed_cli
from ssl_runner.evaluation.tables import FORMATS
from ssl_runner.pretrained import Pretrained, Transform
from ssl_runner.probe import extract
from tests.helpers import CPU, load, toy


def pretrained(side: int = 4) -> Pretrained:
    network = Pretrained(convnet(3, side, [4, 6]), nn.Linear(6, 2), {"image_size": side, "channels": 3})
    return network.eval()


def transform(side: int = 4) -> Transform:
    return Transform(side, 3, torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7]))


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file in any format; features as (n, width)."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file.items())
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return {
            name: np.stack(list(table[name]))
            if name in ("features", "projections")
            else table[name].to_numpy()
            for name in table
        }
    table = pd.read_csv(path)
    wide = {
        name: table[[column for column in table if column.startswith(f"{name}_")]].to_numpy()
        for name in ("features", "projections")
    }
    return {name: table[name].to_numpy() for name in table if "_" not in str(name)} | wide


def pictures(root: Path) -> list[str]:
    """Write images of several sizes and modes, and files that are not images. Returns the images' names."""
    (root / "b").mkdir(parents=True)
    names = ["a b.PNG", "b/grün,=#'.png", "c[1].png"]
    for seed, (name, mode) in enumerate(zip(names, ("RGB", "L", "P"), strict=True)):
        pixels = np.random.default_rng(seed).integers(0, 255, (6 + seed, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(root / name)
    (root / "notes.txt").write_text("no image")
    return names


@pytest.mark.parametrize("ending", sorted(FORMATS))
def test_file_of_a_data_set_holds_every_image_once_with_the_features_of_the_probes(
    ending: str, tmp_path: Path
) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    data, network, target = load(toy(unlabeled=5)), pretrained(), tmp_path / f"f{ending}"
    n = embed.embed_to_file(network, embed.data_set_batches(data, 7), 93, True, target, False)
    columns = read(target)
    assert sorted(columns["index"]) == list(range(n)) == list(range(93))
    for split in ("train", "val", "test"):
        images = getattr(data, split)
        rows = columns["split"] == split
        expected = extract(network.backbone, images, data.mean, data.std)
        np.testing.assert_allclose(columns["features"][rows], expected, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            Z = network.projector(expected)
        np.testing.assert_allclose(columns["projections"][rows], Z, rtol=1e-4, atol=1e-5)
        assert list(columns["label"][rows]) == images.y.tolist()
    assert set(columns["label"][columns["split"] == "unlabeled"]) == {-1}


def test_folder_is_read_in_order_of_paths_through_the_transform(tmp_path: Path) -> None:
    names, network = pictures(tmp_path / "pictures"), pretrained()
    folder, target = embed.Folder(tmp_path / "pictures"), tmp_path / "f.npz"
    embed.embed_to_file(network, folder.batches(transform(), 2, CPU), 3, False, target, False)
    columns = read(target)
    assert list(columns["path"]) == names
    assert folder.skipped.counts.total() == 1
    for name, features in zip(names, columns["features"], strict=True):
        with Image.open(tmp_path / "pictures" / name) as image, torch.no_grad():
            expected = network.backbone(transform()(image)[None])[0]
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_unreadable_image_is_refused_by_name_or_counted(tmp_path: Path) -> None:
    names, target = pictures(tmp_path / "pictures"), tmp_path / "f.npz"
    (tmp_path / "pictures" / "b" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    for skip in (False, True):
        folder = embed.Folder(tmp_path / "pictures", skip)
        batches = folder.batches(transform(), 2, CPU)
        if skip:
            embed.embed_to_file(pretrained(), batches, 4, False, target, False)
            assert folder.skipped.counts["unreadable"] == 1
            assert str(tmp_path / "pictures" / "b" / "broken.jpg") in folder.skipped.names
            assert list(read(target)["path"]) == names
        else:
            with pytest.raises(UsageError, match=r"^b/broken.jpg: expected a readable image"):
                embed.embed_to_file(pretrained(), batches, 4, False, target, False)
            assert not list(tmp_path.glob("f.npz*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run nowhere -o f.npz", "nowhere: expected a folder of images, or dataset=<name>"),
        ("run . -o f.bin", "expected a name that ends with .npz, .csv, .parquet"),
        ("run . -o taken.npz", "expected a new file; give another name, or --overwrite"),
        ("run . -o no/f.npz", "expected an existing folder no"),
        ("run . -o f.npz --batch-size 0", "--batch-size=0: expected an integer >= 1"),
        ("run dataset=mnist5k -o f.npz", "run: expected the folder of a run"),
        ("run .", "expected -o/--out; list the options with ssl-embed --help"),
    ],
)
def test_ssl_embed_rejects_invalid_input_in_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    (tmp_path / "taken.npz").touch()
    monkeypatch.setattr(sys, "argv", ["ssl-embed", *shlex.split(words)])
    with pytest.raises(SystemExit) as exit_:
        embed_cli.main()
    err = capsys.readouterr().err
    assert exit_.value.code == 1
    assert message in err
    assert err.count("\n") == 1


def test_parquet_that_ends_with_an_error_prints_no_traceback(tmp_path: Path, capsys) -> None:
    pytest.importorskip("pyarrow")
    pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "c").mkdir()
    (tmp_path / "pictures" / "c" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    batches = embed.Folder(tmp_path / "pictures").batches(transform(), 1, CPU)
    with pytest.raises(UsageError):
        embed.embed_to_file(pretrained(), batches, 4, False, tmp_path / "f.parquet", False)
    gc.collect()
    assert capsys.readouterr().err.count("Traceback") == 0
    assert not list(tmp_path.glob("f.parquet*"))


def test_names_of_skipped_images_are_sorted(tmp_path: Path) -> None:
    pictures(tmp_path)
    names = [f"{i:02}.jpg" for i in range(20)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"\xff\xd8" + b"x" * (20 - number) * 100_000)
    folder = embed.Folder(tmp_path, True)
    before = len(folder.skipped.names)
    for _ in folder.batches(transform(), 32, CPU):
        pass
    assert folder.skipped.names[before:] == [str(tmp_path / name) for name in names]
