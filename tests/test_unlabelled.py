"""Runs on images without labels, or without test images."""

from pathlib import Path

import pytest

from ssl_runner.runs.files import read_json
from tests.helpers import TINY, make_pictures, run_folder, table

FOLDER = "dataset=folder dataset.root=pictures views=crop " + TINY.replace("dataset.subset=200", "").replace(
    "batch_size=50", "batch_size=18"
)
NO_PROBES = FOLDER.replace("probe.probes=[knn] probe.features=[backbone]", "")


def test_run_without_labels_has_no_probes(ssl_run, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", train=30, test=5, side=16)
    (tmp_path / "pictures" / "notes.txt").write_text("x")
    code, out, err = ssl_run(f"{NO_PROBES} dataset.labels=false diagnostics.every=1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("folder (train/**, unlabelled) pretrain=60 train=0 val=0 test=0 |")
    assert lines[1:3] == [
        "skipped 11 files: 10 in test/ (no training labels), 1 .txt",
        "probes are off: the images have no labels",
    ]
    assert lines[-1].startswith("loss=")
    record = read_json(run_folder(out) / "run.json")
    assert (record["status"], record["top1"], record["classes"]) == ("done", None, [])
    assert len(record["skipped"]["files"]) == 11
    row = table(run_folder(out) / "metrics.csv")[-1]
    assert row["label_energy"] == row["relation_label_energy"] == ""
    assert float(row["effective_rank"]) > 1
    assert not (run_folder(out) / "probe.csv").exists()


def test_run_without_test_images_scores_on_validation(ssl_run, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", train=30, test=5, side=16)
    code, out, err = ssl_run(f"{FOLDER} dataset.root=pictures/train")
    assert (code, err) == (0, "")
    assert "\nval top-1" in out
    rows = table(run_folder(out) / "probe.csv")
    record = read_json(run_folder(out) / "run.json")
    assert [(row["eval_split"], row["train_split"]) for row in rows] == [("val", "train")]
    assert record["top1"] == record["val_top1"] == float(rows[0]["top1"])
    assert record["images"] == {"pretrain": 54, "train": 54, "val": 6, "test": 0}


def test_closed_form_solves_without_labels(ssl_run, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", train=30, test=5, side=8)
    settings = "solver=closed_form backbone=linear projector=identity dataset.labels=false"
    tiny = "dataset=folder dataset.root=pictures batch_size=18 device=cpu backbone.width=4"
    code, out, err = ssl_run(f"{tiny} {settings} loss=vicreg variance=squared")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("loss=")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("relation=labels", "relation: expected a label for every image, but folder has unlabelled images"),
        ("probe.every=1", "probe.every=1: expected images with labels, which probes need"),
        (
            "probe.probes=[knn]",
            "probe.probes=[knn]: expected images with labels, which probes need, but folder has none; use"
            " labelled images, or leave it at [linear,knn]",
        ),
        ("dataset.test_fraction=0.1", "dataset.test_fraction=0.1: expected 0, since folder has no labels"),
        (
            "dataset.subset=70",
            "dataset.subset=70: expected an integer from 1 to 60, the numbers of",
        ),
    ],
)
def test_settings_that_need_labels_are_refused(ssl_run, tmp_path: Path, settings: str, message: str) -> None:
    make_pictures(tmp_path / "pictures", train=30, test=5, side=8)
    code, _, err = ssl_run(f"{NO_PROBES} dataset.labels=false {settings}")
    assert code == 1
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_search_on_images_without_labels_is_refused(ssl_run, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", train=30, test=5, side=16)
    code, out, err = ssl_run(
        f"-m hydra/sweeper=optuna {NO_PROBES} dataset.labels=false gamma=1,5 hydra.sweep.dir=search"
    )
    assert (code, out) == (1, "")
    assert err.startswith("hydra/sweeper=optuna: expected images with labels")
    assert not (tmp_path / "search").exists()
