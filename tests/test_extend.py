"""More epochs than planned: resume=<folder> epochs=<more> continues a run with a schedule of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ssl_runner import optimizer
from ssl_runner.report.read import read_runs
from ssl_runner.runs import checkpoint
from ssl_runner.runs.schedule import remove_outdated
from tests.helpers import TINY, preempt_after, run_folder, table

BASE = f"{TINY} optimizer.warmup_epochs=0.5 diagnostics.every=0"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def config(folder: Path, name: str = "config.yaml") -> Any:
    return OmegaConf.load(folder / ".hydra" / name)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(one: Path, other: Path) -> bool:
    states = [checkpoint.load(checkpoint.find(folder)) for folder in (one, other)]
    return all(
        torch.equal(value, states[1][part][name])
        for part in ("backbone", "projector")
        for name, value in states[0][part].items()
    )


@pytest.fixture
def finished(ssl_run, cached: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of two epochs."""
    if not cached.exists():
        code, _, err = ssl_run(f"{BASE} hydra.run.dir='{cached}'")
        assert (code, err) == (0, "")
    return shutil.copytree(cached, tmp_path / "mine")


def test_only_files_that_a_run_writes_are_outdated(tmp_path: Path) -> None:
    own = {"figure.png", "teacher.safetensors", "run.json", "epochs-2"}
    (tmp_path / "epochs-2").mkdir()
    (tmp_path / "epochs-2" / "run.json").touch()
    for name in ("run.json", "figure.png", "teacher.safetensors", "backbone.safetensors", "embedding.png"):
        (tmp_path / name).touch()
    remove_outdated(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == own


def test_learning_rate_restarts_in_every_part() -> None:
    """Two parts are two cosines; the second one starts where it begins, not where the first was to end."""
    options = {"warmup_epochs": 1.5, "lr": 0.3, "final_ratio": 0.1}
    schedule = [{"from_epoch": 0, "to_epoch": 10}, {"from_epoch": 4, "to_epoch": 9}]
    rates = [optimizer.learning_rate(step, schedule, 6, **options) for step in range(54)]
    first = [optimizer.cosine(step, 60, 9, 0.3, 0.1) for step in range(24)]
    second = [optimizer.cosine(step, 30, 9, 0.3, 0.1) for step in range(30)]
    assert rates == first + second
    assert max(rates) == 0.3


def test_finished_run_is_extended(ssl_run, tmp_path: Path) -> None:
    folder = run_folder(ssl_run(f"{BASE} probe.every=1")[1])
    before, identity = files(folder), record(folder)["identity"]
    code, out, err = ssl_run(f"resume={folder} epochs=5")
    assert (code, err) == (0, "")
    assert run_folder(out) == folder
    assert "\nresumed after 2 of 5 epochs\n" in out

    old, new = table(folder / "epochs-2" / "metrics.csv"), table(folder / "metrics.csv")
    assert new[:2] == old
    assert [int(row["step"]) for row in new] == [3, 6, 9, 12, 15]
    expected = [optimizer.cosine(step, 9, 2, 0.002, 0.0) for step in (2, 5, 8)]
    assert [float(row["lr"]) for row in new[2:]] == expected
    assert record(folder)["schedule"] == [{"from_epoch": 0, "to_epoch": 2}, {"from_epoch": 2, "to_epoch": 5}]
    assert record(folder)["status"] == "done"
    assert record(folder)["identity"] != identity
    assert [row["epoch"] for row in table(folder / "probe.csv")] == ["1", "2", "3", "4", "5", "5"]

    kept = {
        path.relative_to(folder / "epochs-2"): content for path, content in files(folder / "epochs-2").items()
    }
    originals = {path.relative_to(folder): content for path, content in before.items()}
    assert kept.items() <= originals.items()
    assert {path.name for path in originals.keys() - kept.keys()} == {
        "checkpoint.pt",
        "checkpoint-before.pt",
        ".lock",
    }
    assert config(folder).epochs == 5
    assert config(folder, "config-2.yaml").epochs == 2
    assert "epochs=5" in config(folder, "overrides.yaml")
    assert "epochs=2" not in config(folder, "overrides.yaml")
    reported = {run.path: run.config["epochs"] for run in read_runs([folder], tmp_path / "report")}
    assert reported == {folder: "5", folder / "epochs-2": "2"}

    for command in (f"resume={folder}", f"resume={folder} epochs=5"):
        assert "this run is done with its 5 epochs; give more, such as epochs=10" in ssl_run(command)[2]
    assert ssl_run(f"resume={folder} epochs=6")[0] == 0  # once more
    assert [part["to_epoch"] for part in record(folder)["schedule"]] == [2, 5, 6]


@pytest.mark.parametrize(
    "step", [pytest.param(7, marks=pytest.mark.slow), 11, pytest.param(15, marks=pytest.mark.slow)]
)
def test_extended_run_that_is_preempted_resumes_exactly(
    step: int, ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 7 to 15 belong to the new part: its first step, the middle of an epoch, and the last step."""
    whole = run_folder(
        ssl_run(f"{BASE} probe.every=1 relation=neighbors relation.queue=60 hydra.run.dir=whole")[1]
    )
    mine = tmp_path / "mine"
    shutil.copytree(whole, mine)
    assert ssl_run(f"resume={whole} epochs=5")[0] == 0
    with monkeypatch.context() as patch:
        preempt_after(step, patch)
        assert ssl_run("resume=mine epochs=5")[0] == 75
    assert record(mine)["status"] == "preempted"
    assert ssl_run("resume=mine epochs=5" if step == 11 else "resume=mine")[0] == 0
    for name in ("metrics.csv", "probe.csv"):
        assert table(mine / name) == table(whole / name)
    assert same_weights(mine, whole)
    for key in ("schedule", "identity", "top1", "loss"):
        assert record(mine)[key] == record(whole)[key]


@pytest.mark.parametrize(("step", "begin"), [pytest.param(2, 1, marks=pytest.mark.slow), (3, 1), (4, 2)])
def test_unfinished_run_is_extended_after_the_epoch_of_its_checkpoint(
    step: int, begin: int, ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted epoch ends with the earlier learning rates."""
    with monkeypatch.context() as patch:
        preempt_after(step, patch)
        assert ssl_run(f"{BASE} epochs=4 hydra.run.dir=mine")[0] == 75
    assert ssl_run("resume=mine epochs=6")[0] == 0
    assert record(tmp_path / "mine")["schedule"] == [
        {"from_epoch": 0, "to_epoch": 4},
        {"from_epoch": begin, "to_epoch": 6},
    ]
    steps = [3 * epoch - 1 for epoch in range(1, 7)]
    expected = [
        optimizer.cosine(at, 12, 2, 0.002, 0.0)
        if at < 3 * begin
        else optimizer.cosine(at - 3 * begin, 18 - 3 * begin, 2, 0.002, 0.0)
        for at in steps
    ]
    assert [float(row["lr"]) for row in table(tmp_path / "mine" / "metrics.csv")] == expected
    assert not (tmp_path / "mine" / "epochs-4").exists()
    assert config(tmp_path / "mine", "config-4.yaml").epochs == 4


def test_options_that_follow_epochs_follow_an_extension(ssl_run, tmp_path: Path) -> None:
    """As `every: ${epochs}` of a recipe. An option that is given must not change."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\nepochs: 2\nprobe:\n  every: ${epochs}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(recipe)
    tiny = BASE.replace("epochs=2 ", "", 1)
    folder = run_folder(ssl_run(f"--config-dir conf experiment=mine {tiny}")[1])
    assert "Cannot change V (2 -> 3)" in ssl_run(f"resume={folder} epochs=3 V=3")[2]
    assert ssl_run(f"resume={folder} epochs=3")[0] == 0
    assert config(folder).probe.every == 3


@pytest.mark.parametrize(
    ("settings", "command", "message"),
    [
        (
            "optimizer.warmup_epochs=2",
            "epochs=3",
            "expected at least 2 + optimizer.warmup_epochs, which is 4",
        ),
        ("views.resolutions=[16,28]", "epochs=4", "a run with views.resolutions cannot be extended"),
        (
            "solver=closed_form backbone=convnet projector=linear",
            "epochs=4",
            "expected a solver that trains, to extend a run; start a new run",
        ),
    ],
)
def test_run_that_cannot_be_extended_is_refused_in_one_line(
    settings: str, command: str, message: str, ssl_run, tmp_path: Path
) -> None:
    tiny = BASE if "projector" not in settings else BASE.replace("projector.width=16 ", "")
    code, _, err = ssl_run(f"{tiny} {settings} hydra.run.dir=mine")
    assert (code, err) == (0, "")
    refused(tmp_path / "mine", command, message, ssl_run)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("epochs=1", "epochs=1: expected more than the 2 epochs that"),
        ("epochs=4 gamma=3", "Cannot change gamma (10.0 -> 3) when resuming"),
    ],
)
def test_invalid_extension_is_refused_in_one_line(
    command: str, message: str, finished: Path, ssl_run
) -> None:
    refused(finished, command, message, ssl_run)


def refused(folder: Path, command: str, message: str, ssl_run) -> None:
    """Check that resume=<folder> with this command prints one line, and leaves the files as they are."""
    before = files(folder)
    code, out, err = ssl_run(f"resume={folder} {command}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert files(folder) == before


def test_finished_run_without_checkpoint_is_not_extended(finished: Path, ssl_run) -> None:
    (finished / "checkpoint.pt").unlink()
    _, _, err = ssl_run(f"resume={finished} epochs=3")
    assert "has no checkpoint of its last epoch; start a new run with init_weights=" in err
    assert record(finished)["status"] == "done"


def test_resume_auto_does_not_take_an_extended_run_for_a_longer_one(ssl_run, tmp_path: Path) -> None:
    """Its learning rates differ from those of a run that was planned for as many epochs."""
    command = f"{BASE} resume=auto"
    folder = run_folder(ssl_run(f"{command} epochs=1")[1])
    assert ssl_run(f"resume={folder} epochs=2")[0] == 0
    longer = run_folder(ssl_run(f"{command} epochs=2")[1])
    assert longer != folder
    assert len(record(longer)["schedule"]) == 1
    code, out, _ = ssl_run(f"{command} epochs=1")
    assert (code, run_folder(out)) == (0, folder / "epochs-1")
    assert "already done" in out


def test_overrides_with_interpolations_are_kept(ssl_run, tmp_path: Path) -> None:
    command = f"{BASE} epochs=1".replace("diagnostics.every=0", "diagnostics.every=${epochs}")
    folder = run_folder(ssl_run(command)[1])
    code, _, err = ssl_run(f"resume={folder} epochs=2")
    assert (code, err) == (0, "")
    assert config(folder).diagnostics.every == 2
    lines = OmegaConf.to_container(config(folder, "overrides.yaml"), resolve=False)
    assert "diagnostics.every=${epochs}" in lines


def test_epochs_of_an_edited_preset_do_not_extend_a_run(ssl_run, tmp_path: Path) -> None:
    """Only epochs on the command line do. A folder may have the name of a number, as in a sweep."""
    preset = tmp_path / "mine" / "experiment" / "short.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\nepochs: 2\n")
    options = BASE.replace("epochs=2 ", "")
    with pytest.MonkeyPatch.context() as patch:
        preempt_after(2, patch)
        assert ssl_run(f"{options} --config-dir mine experiment=short hydra.run.dir=1")[0] == 75
    preset.write_text("# @package _global_\nepochs: 4\n")
    code, _, err = ssl_run("resume=1")
    assert (code, err) == (0, "")
    assert record(tmp_path / "1")["schedule"] == [{"from_epoch": 0, "to_epoch": 2}]
    assert len(table(tmp_path / "1" / "metrics.csv")) == 2


def test_damaged_record_is_named(finished: Path, ssl_run) -> None:
    (finished / "run.json").write_text("")
    _, _, err = ssl_run(f"resume={finished} epochs=3")
    assert f"{finished}/run.json: expected a JSON object" in err
    assert err.count("\n") == 1
