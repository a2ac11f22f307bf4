"""Rows of the baselines are computed once per data set and settings, and reused unchanged."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from ssl_runner import build
from ssl_runner.data.dataset import DataSet
from ssl_runner.evaluation.finished import compose_groups
from ssl_runner.probe import (
    BaselineCache,
    KnnProbe,
    LinearProbe,
    Probe,
    evaluate,
    evaluate_seeded,
    label_draws,
)
from tests.helpers import TINY, load, run_folder, table, toy

CLASSIFIERS = {"linear": LinearProbe, "knn": KnnProbe}
SETTINGS = {"classifiers": [["linear", {"_target_": "ssl_runner.probe.LinearProbe"}]], "seed": 0}
NETWORKS: dict[str, Any] = {"pixels": {}, "pca": {"K": 8}, "random_init": {"seed": 0}}


@pytest.fixture
def data() -> DataSet:
    return load(toy())


def computed(data: DataSet) -> list[dict[str, Any]]:
    return list(evaluate("pixels", nn.Flatten(), data, CLASSIFIERS, score_test=True))


def refuse() -> list[dict[str, Any]]:
    raise AssertionError("computed again")


def hits(cache: BaselineCache, features: str = "pixels") -> bool:
    """Whether the rows of these features are read from the cache. Leaves them in it."""
    return cache.rows(features, lambda: [{"top1": 0.5}])[0]["cached"]


def test_cached_rows_equal_computed_rows(tmp_path: Path, data: DataSet) -> None:
    first = BaselineCache(tmp_path, data, SETTINGS, NETWORKS).rows("pixels", lambda: computed(data))
    second = BaselineCache(tmp_path, load(toy()), SETTINGS, NETWORKS).rows("pixels", refuse)
    assert [row.pop("cached") for row in first] == [False] * 4
    assert [row.pop("cached") for row in second] == [True] * 4
    assert second == first
    assert [row | {"seconds": 0} for row in first] == [row | {"seconds": 0} for row in computed(data)]


def test_features_of_the_training_are_never_cached(tmp_path: Path, data: DataSet) -> None:
    cache = BaselineCache(tmp_path, data, SETTINGS, NETWORKS)
    for top1 in (0.1, 0.2):
        assert cache.rows("backbone", lambda top1=top1: [{"top1": top1}]) == [{"top1": top1, "cached": None}]
    assert list(tmp_path.iterdir()) == []


def test_ranks_follow_the_main_process(
    tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank reads and writes no file: it computes if and only if the main process does."""
    monkeypatch.setattr("ssl_runner.distributed.is_main_process", lambda: False)
    cache = BaselineCache(tmp_path, data, SETTINGS, NETWORKS)
    for sent, expected in (
        ([{"top1": 0.25}], {"top1": 0.25, "cached": True}),
        (None, {"top1": 0.5, "cached": False}),
    ):
        monkeypatch.setattr("ssl_runner.distributed.broadcast_object", lambda own, sent=sent: own or sent)
        assert cache.rows("pixels", lambda: [{"top1": 0.5}]) == [expected]
    assert list(tmp_path.iterdir()) == []


def changed_pixel(data: DataSet) -> DataSet:
    images = data.train.images.clone()
    images[data.test.indices[-1], 2, 3, 3] ^= 1
    return replace(data, test=replace(data.test, images=images))


def changed_label(data: DataSet) -> DataSet:
    labels = data.val.labels.clone()
    labels[data.val.indices[0]] ^= 1
    return replace(data, val=replace(data.val, labels=labels))


CHANGES: dict[str, Callable[[DataSet], DataSet]] = {
    "pixel": changed_pixel,
    "label": changed_label,
    "name": lambda data: replace(data, name="other"),
    "digest": lambda data: replace(data, digest="0" * 16),
    "mean": lambda data: replace(data, mean=data.mean + 0.1),
    "split": lambda data: replace(data, train=replace(data.train, indices=data.train.indices[1:])),
    "seed of the split": lambda data: load(toy(), split_seed=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_data_set_misses(tmp_path: Path, data: DataSet, change: Callable) -> None:
    assert not hits(BaselineCache(tmp_path, data, SETTINGS, NETWORKS))
    assert hits(BaselineCache(tmp_path, load(toy()), SETTINGS, NETWORKS))
    assert not hits(BaselineCache(tmp_path, change(data), SETTINGS, NETWORKS))


@pytest.mark.parametrize(
    ("settings", "networks"),
    [
        (SETTINGS | {"precision": "bf16"}, NETWORKS),
        (SETTINGS | {"classifiers": [["knn", {"_target_": "ssl_runner.probe.KnnProbe"}]]}, NETWORKS),
        (SETTINGS, NETWORKS | {"pixels": {"seed": 1}}),
    ],
    ids=["precision", "classifiers", "network"],
)
def test_changed_settings_miss(tmp_path: Path, data: DataSet, settings: Any, networks: Any) -> None:
    assert not hits(BaselineCache(tmp_path, data, SETTINGS, NETWORKS))
    assert not hits(BaselineCache(tmp_path, data, settings, networks))
    assert hits(BaselineCache(tmp_path, data, SETTINGS, NETWORKS))
    assert not hits(BaselineCache(tmp_path, data, SETTINGS, NETWORKS), "random_init")


def test_other_number_of_threads_misses(tmp_path: Path, data: DataSet) -> None:
    cache, threads = BaselineCache(tmp_path, data, SETTINGS, NETWORKS), torch.get_num_threads()
    assert not hits(cache)
    torch.set_num_threads(threads + 1)
    try:
        assert not hits(cache)
    finally:
        torch.set_num_threads(threads)
    assert hits(cache)


def test_changed_source_of_a_custom_probe_misses(
    tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "mine_probe.py"
    module.write_text("class Mine: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"classifiers": [["mine", {"_target_": "mine_probe.Mine"}]]}
    cache = BaselineCache(tmp_path / "cache", data, settings, NETWORKS)
    assert not hits(cache)
    assert hits(cache)
    module.write_text("class Mine: x = 1\n")
    assert not hits(cache)


def test_changed_content_of_a_file_named_in_the_settings_misses(tmp_path: Path, data: DataSet) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"1234")
    network = {"backbone": {"checkpoint_path": str(file), "long": "x" * 5000, "none": None, "nul": "\0"}}
    cache = BaselineCache(tmp_path / "cache", data, SETTINGS, {"pixels": {}, "random_init": network})
    assert not hits(cache, "random_init")
    assert not hits(cache)
    file.write_bytes(b"5678")
    assert not hits(cache, "random_init")
    assert hits(cache, "random_init")
    assert hits(cache)  # does not depend on the file


def test_other_number_of_processes_misses(
    tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BaselineCache(tmp_path, data, SETTINGS, NETWORKS)
    assert not hits(cache)
    monkeypatch.setattr("ssl_runner.distributed.world_size", lambda: 2)
    assert not hits(cache)


def test_features_without_rows_are_not_stored(tmp_path: Path, data: DataSet) -> None:
    """They give a line in every run."""
    cache = BaselineCache(tmp_path, data, SETTINGS, NETWORKS)
    assert cache.rows("pixels", list) == []
    assert list(tmp_path.iterdir()) == []


def configured(data: DataSet, root: Path, *overrides: str, seed: int = 0, **switches: bool) -> BaselineCache:
    """The cache of a run with label shares."""
    cfg = compose_groups([f"dataset.root={root}", *overrides], None)
    draws = label_draws(data.train.y, [0.5], 2, seed)
    return build.baseline_cache(cfg, data, draws, {"deterministic": False, "tf32": False} | switches, K=8)


def test_cache_of_a_run_depends_on_what_its_rows_depend_on(
    tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_RUNNER_DATA", str(tmp_path))
    make = partial(configured, data, tmp_path)
    lines = ["dataset=folder"]
    assert not hits(make(*lines))
    assert hits(make(*lines))
    assert hits(make(*lines, "precision=bf16"))  # features are computed in fp32
    assert not hits(make(*lines, deterministic=True))
    assert not hits(make(*lines, tf32=True))
    assert not hits(make(*lines, seed=1))  # other draws
    timm = [*lines, "backbone=timm", "backbone.name=resnet10t"]
    assert not hits(make(*timm), "random_init")
    assert hits(make(*timm), "random_init")
    assert hits(make(*timm, "+backbone.pretrained=true"), "random_init") is None  # not cached


@pytest.mark.parametrize("damage", ["cut", "number", "not a table"])
def test_damaged_entry_is_computed_again_with_a_line(
    tmp_path: Path, data: DataSet, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = BaselineCache(tmp_path, data, SETTINGS, NETWORKS)
    hits(cache)
    [file] = tmp_path.iterdir()
    text = file.read_text()
    content = json.loads(text)
    content["rows"][0]["top1"] = 0.75
    file.write_text({"cut": text[:-40], "number": json.dumps(content), "not a table": "[]"}[damage])
    assert not hits(cache)
    assert capsys.readouterr().err.startswith(f"warning: {file}: expected cached rows of probe.csv (")
    assert hits(cache)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_cache_that_cannot_be_written_gives_a_line(
    tmp_path: Path, data: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    cache = BaselineCache(tmp_path / "file", data, SETTINGS, NETWORKS)
    assert not any(hits(cache, features) for features in NETWORKS)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/file: expected a folder to read and write (Not a directory); the rows are not"
        " cached\n"
    )


class Drawing(Probe):
    """Scores from torch's generator."""

    hyperparameter = "none"

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.classes = classes

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        yield 0.0, self.scores(0.0, X_eval)

    def scores(self, value: float, X_eval: Tensor) -> Tensor:
        return torch.rand(len(X_eval), self.classes)


def test_rows_of_a_classifier_that_draws_do_not_depend_on_earlier_features(data: DataSet) -> None:
    def rows() -> list[Any]:
        found = evaluate_seeded("pixels", nn.Flatten, data, {"drawing": Drawing}, [None], seed=3)
        return [row | {"seconds": 0} for row in found]

    before = rows()
    torch.rand(5)
    assert rows() == before


def test_second_run_reads_the_baselines_of_the_first(ssl_run: Callable, tmp_path: Path) -> None:
    command = f"{TINY} epochs=1 dataset.subset=100 probe.features=[backbone,random_init,pixels,pca]"

    def cached(extra: str) -> tuple[list[Any], list[dict[str, str]]]:
        code, out, err = ssl_run(f"{command} {extra}")
        assert code == 0, err
        path = run_folder(out) / "probe.csv"
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        return rows[rows.eval_split == "test"].cached.tolist(), table(path)

    first, rows = cached("")
    assert first == ["", "False", "False", "False"]
    assert cached("") == (["", "True", "True", "True"], rows)
    assert cached("seed=1 projector.K=6")[0] == ["", "False", "True", "False"]
    assert cached("probe.cache=false") == (["", "False", "False", "False"], rows)
    assert len(list((tmp_path / "data" / "baselines").iterdir())) == 5
