"""A run and its images: resuming and evaluating on images that have changed, names of files."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ssl_runner.data import image_folder
from ssl_runner.data.dataset import Source
from ssl_runner.evaluation import embed_cli, probe_cli
from ssl_runner.evaluation.finished import config_of
from ssl_runner.runs.files import read_json, write_json
from tests.helpers import TINY, load, make_pictures, preempt_after, run_script, table

SETTINGS = "dataset=folder views=crop diagnostics.every=0 " + TINY.replace("dataset.subset=200", "").replace(
    "batch_size=50", "batch_size=18"
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """60 training and 10 test images of two classes; the folder of a run that was trained on them."""
    make_pictures(tmp_path / "pictures", train=30, test=5, side=8)
    return tmp_path / "pictures"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[[ModuleType, str], tuple[int, str, str]]:
    """Return a function that runs a console script in-process."""

    def run(module: ModuleType, words: str) -> tuple[int, str, str]:
        return run_script(module.main, shlex.split(words), monkeypatch, capsys)

    return run


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps a finished run and its images between tests."""
    return tmp_path_factory.mktemp("cached")


@pytest.fixture
def finished(ssl_run, cached: Path, tmp_path: Path) -> Path:
    """A copy of a finished run on the images in cached/pictures."""
    if not (cached / "run").exists():
        make_pictures(cached / "pictures", train=30, test=5, side=8)
        command = f"{SETTINGS} dataset.root='{cached}/pictures' epochs=1 hydra.run.dir='{cached}/run'"
        assert ssl_run(command)[0] == 0
    return shutil.copytree(cached / "run", tmp_path / "run")


def add_image(folder: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "new.png")


def read(roots: list[Path], cache: Path, **options: object) -> Source:
    return image_folder.folder([str(root) for root in roots], None, str(cache), **options)


def test_digest_follows_names_lengths_and_labels_but_not_the_place(pictures: Path, tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return load(read([root], tmp_path / "cache")).digest

    before = digest(pictures)
    moved = shutil.copytree(pictures, tmp_path / "elsewhere", copy_function=shutil.copy)
    assert digest(moved) == before
    first, second = moved / "train" / "dark" / "0.png", moved / "train" / "light" / "new.png"
    shutil.move(first, second)
    changed = [digest(moved)]
    shutil.move(second, first)
    assert digest(moved) == before
    first.write_bytes(first.read_bytes() + b"\0")
    changed.append(digest(moved))
    shutil.move(moved / "train" / "dark", moved / "train" / "medium")
    shutil.move(moved / "test" / "dark", moved / "test" / "medium")
    changed.append(digest(moved))
    assert len({before, *changed}) == 4


@pytest.mark.parametrize("extend", [False, True])
def test_resume_on_changed_images_is_refused_until_they_are_restored(
    extend: bool, ssl_run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{SETTINGS} dataset.root={pictures} hydra.run.dir=run"
    if extend:
        assert ssl_run(command)[0] == 0
    else:
        with monkeypatch.context() as patch:
            preempt_after(4, patch)
            assert ssl_run(command)[0] == 75
    run = tmp_path / "run"
    before = read_json(run / "run.json")
    rows = table(run / "metrics.csv")
    add_image(pictures / "train" / "dark")
    resume = f"resume=run epochs={3 if extend else 2}"
    weights = run / ("backbone.safetensors" if extend else "checkpoint.pt")
    for words in (resume, "resume=run"):
        code, out, err = ssl_run(words)
        assert (code, out) == (1, "")
        assert err == (
            f"the images of dataset.root={pictures} have changed since the run started: pretrain 54 -> 55,"
            f" train 54 -> 55; restore them, or start a new run with init_weights={weights}\n"
        )
    assert table(run / "metrics.csv") == rows
    assert read_json(run / "run.json")["data_digest"] == before["data_digest"]
    assert read_json(run / "run.json")["images"] == before["images"]
    assert ssl_run(f"{SETTINGS} dataset.root={pictures} init_weights={weights}")[0] == 0
    (pictures / "train" / "dark" / "new.png").unlink()
    assert ssl_run("resume=run")[0] == 0
    assert len(table(run / "metrics.csv")) == (3 if extend else 2)


@pytest.mark.slow
def test_run_recorded_without_digest_or_checkpoint_resumes(
    ssl_run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_digest", "no_checkpoint"):
        with monkeypatch.context() as patch:
            preempt_after(4, patch)
            assert ssl_run(f"{SETTINGS} dataset.root={pictures} hydra.run.dir={name}")[0] == 75
    record = read_json(tmp_path / "no_digest" / "run.json")
    assert record.pop("data_digest")
    write_json(tmp_path / "no_digest" / "run.json", record)
    for file in (tmp_path / "no_checkpoint").glob("checkpoint*.pt"):
        file.unlink()
    add_image(pictures / "train" / "dark")
    for name in ("no_digest", "no_checkpoint"):
        assert ssl_run(f"resume={name}")[0] == 0
        assert read_json(tmp_path / name / "run.json")["images"]["train"] == 55


@pytest.mark.slow
def test_evaluation_warns_of_changed_images_and_names_files(
    ssl_run, call, pictures: Path, tmp_path: Path
) -> None:
    assert ssl_run(f"{SETTINGS} dataset.root={pictures} epochs=1 hydra.run.dir=run")[0] == 0
    assert call(probe_cli, "run")[2] == ""
    assert call(embed_cli, "run -o a.npz")[2] == ""
    with np.load(tmp_path / "a.npz") as file:
        columns = dict(file)
    names = {str(path.relative_to(pictures)) for path in pictures.rglob("*.png")}
    assert set(columns["path"].tolist()) == names
    for name, split, label in zip(columns["path"], columns["split"], columns["class"], strict=True):
        assert name.split("/")[:2] == ["test" if split == "test" else "train", label]

    add_image(pictures / "train" / "dark")
    warning = (
        f"warning: the images of dataset.root={pictures} have changed since the run: pretrain 54 -> 55, train"
        " 54 -> 55; the splits may differ from those of the run\n"
    )
    for module, words in ((probe_cli, "run"), (embed_cli, "run -o b.npz")):
        assert call(module, words)[::2] == (0, warning)
    assert call(probe_cli, f"run dataset.root={pictures}/train")[::2] == (0, "")  # another data set


def test_names_of_files_are_relative_to_the_list_or_the_common_folder(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"path\npictures/train/dark/3.png\n{pictures}/test/light/1.png\n")
    data = image_folder.folder(None, None, str(tmp_path / "cache"), files=str(tmp_path / "l.csv"))
    assert data.files == ["pictures/train/dark/3.png", "pictures/test/light/1.png"]
    roots = [pictures / "train" / "dark", pictures / "train" / "light"]
    data = load(read(roots, tmp_path / "cache", labels=False))
    assert data.files is not None
    assert (data.files[0], data.files[-1]) == ("dark/0.png", "light/9.png")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("dataset.root={root}", "folder"),
        ("dataset.root={root}/../pictures", "folder"),
        ("dataset=folder dataset.root={root} dataset.size=8 dataset.storage=host", "folder"),
        ("dataset.root={root}/train", "folder:root={root}/train"),
        ("dataset.root=[{root}/train,{root}/test]", "folder:root=[{root}/train,{root}/test]"),
        ("dataset.files=l.csv", "folder:files={here}/l.csv"),
        ("dataset.subset=20 dataset.split_seed=4", "folder:subset=20,split_seed=4"),
        ("dataset.labels=false", "folder:labels=false"),
        ("dataset=mnist5k", "mnist5k"),
        ("dataset.subset=20 dataset.name=mine", "mine"),
    ],
)
def test_name_of_other_data_lists_the_options_that_differ(
    overrides: str, name: str, finished: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cached)
    root = (cached / "pictures").resolve()
    cfg = config_of(finished, overrides.format(root=root).split())
    assert cfg.dataset.name == name.format(root=root, here=root.parent)


def test_files_and_root_replace_each_other(finished: Path, cached: Path) -> None:
    root = (cached / "pictures").resolve()
    dataset = config_of(finished, ["dataset.files=l.csv"]).dataset
    assert (dataset.root, dataset.files) == (None, "l.csv")
    saved = OmegaConf.load(finished / ".hydra" / "config.yaml")
    saved.dataset.root, saved.dataset.files = None, "l.csv"
    OmegaConf.save(saved, finished / ".hydra" / "config.yaml")
    dataset = config_of(finished, [f"dataset.root={root}"]).dataset
    assert (dataset.root, dataset.files) == (str(root), None)
    assert dataset.name == f"folder:root={root}"
