"""Runs that an earlier version made: their configuration lacks options, or has former defaults."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ssl_runner.config import arguments, check, compose, renamed
from ssl_runner.config.run_id import run_id
from ssl_runner.errors import UsageError
from ssl_runner.runs.files import write_json
from ssl_runner.runs.run_json import read_record
from tests.helpers import TINY, preempt_after, raising, run_folder, table

LATER = ("deterministic", "dataset.eval_resize", "dataset.eval_crop", "probe.cache")  # options added since
COMMAND = f"{TINY} diagnostics.every=0"
EXACT = ("metrics.csv", "probe.csv")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def config(folder: Path) -> Any:
    return OmegaConf.load(folder / ".hydra" / "config.yaml")


def age(folder: Path) -> None:
    """Make a run look like one of a version without `LATER` and with the former defaults."""
    content = OmegaConf.to_container(config(folder))
    assert isinstance(content, dict)
    for key in LATER:
        path, _, name = key.rpartition(".")
        del (content[path] if path else content)[name]
    content |= renamed.DEFAULTS
    OmegaConf.save(OmegaConf.create(content), folder / ".hydra" / "config.yaml")
    (folder / "run.json").write_text(json.dumps(record(folder) | {"identity": "of an earlier version"}))


@pytest.fixture
def preempted(ssl_run, cached: Path, tmp_path: Path) -> Path:
    """A copy of a preempted run of an earlier version."""
    if not cached.exists():
        with pytest.MonkeyPatch.context() as patch:
            preempt_after(4, patch)
            assert ssl_run(f"{COMMAND} hydra.run.dir='{cached}'")[0] == 75
        age(cached)
    return shutil.copytree(cached, tmp_path / "mine")


@pytest.mark.parametrize("again", ["resume=mine", "resume=mine deterministic=false compile=false"])
def test_run_of_an_earlier_version_resumes_exactly(
    again: str, preempted: Path, ssl_run, tmp_path: Path
) -> None:
    assert ssl_run(f"{COMMAND} hydra.run.dir=whole")[0] == 0
    code, _, err = ssl_run(again)
    assert (code, err) == (0, "")
    for name in EXACT:
        assert table(preempted / name) == table(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ("compile=true", "compile (false -> true)"),
        ("compile=auto", "compile (false -> auto)"),
        ("deterministic=true", "deterministic (false -> true)"),
        ("dataset.eval_crop=20", "dataset.eval_crop (null -> 20)"),
        ("optimizer=sgd", "optimizer (adamw -> sgd)"),
        ("+evaluators.norm._target_=tests.helpers.Norm", "evaluators.norm._target_ (null -> "),
    ],
)
def test_change_of_an_earlier_versions_run_is_refused(
    options: str, change: str, preempted: Path, ssl_run
) -> None:
    before = record(preempted)
    code, _, err = ssl_run(f"resume=mine {options}")
    assert (code, err.count("\n")) == (1, 1)
    assert f"Cannot change {change}" in err
    assert record(preempted) == before


def test_run_of_an_earlier_version_is_extended(ssl_run, tmp_path: Path) -> None:
    command = COMMAND.replace("diagnostics.every=0", "diagnostics.every=${epochs}")
    for name in ("old", "new"):
        assert ssl_run(f"{command} hydra.run.dir={name}")[0] == 0
    age(tmp_path / "old")
    for name in ("old", "new"):
        code, _, err = ssl_run(f"resume={name} epochs=3")
        assert (code, err) == (0, "")
    for name in EXACT:
        assert table(tmp_path / "old" / name) == table(tmp_path / "new" / name)
    assert config(tmp_path / "old") == OmegaConf.merge(config(tmp_path / "new"), renamed.DEFAULTS)


@pytest.mark.parametrize(
    ("experiment", "options"),
    [
        ("low_label", "loss=vicreg variance=squared beta=25 gamma=1"),
        ("low_label", "loss=simclr tau=0.5"),
        ("low_label", "loss=barlow"),
        ("rank_vs_gamma", "loss=vicreg variance=squared beta=25 gamma=50"),
        ("rank_vs_gamma", "loss=simclr tau=0.2"),
        ("rank_vs_gamma", "loss=barlow alpha=0.005"),
    ],
)
def test_overrides_of_former_headers_compose(experiment: str, options: str) -> None:
    """Resuming composes them without the experiment's sweep."""
    compose.register_resolvers()
    compose.prefer_our_presets()
    words = ["seed=0", f"experiment={experiment}", *options.split(), "resume=old"]
    [(_, config)] = check.check(arguments.parse(arguments.parser(), words))
    assert config.projector.K == 64


@pytest.mark.slow
def test_resume_auto_finds_a_run_of_an_earlier_version(ssl_run, tmp_path: Path) -> None:
    """Not if an option that the run lacks has another value, or if a former default was given."""
    command = f"{COMMAND} epochs=1 resume=auto"
    folder = run_folder(ssl_run(command)[1])
    given = run_folder(ssl_run(f"{command} compile=true")[1])
    shutil.copytree(given, tmp_path / "kept")
    age(folder)
    code, out, err = ssl_run(command)
    assert (code, err, run_folder(out)) == (0, "", folder)
    assert "already done" in out
    (folder / "run.json").write_text(json.dumps(record(folder) | {"status": "failed"}))
    for starts in (2, 2):
        code, out, err = ssl_run(command)
        assert (code, err, run_folder(out)) == (0, "", folder)
        assert (record(folder)["starts"], record(folder)["status"]) == (starts, "done")
    assert config(folder).compile is False
    others = [run_folder(ssl_run(f"{command} {key}")[1]) for key in ("compile=auto", "deterministic=true")]
    assert len({folder, given, *others}) == 4


def test_saved_value_wins_over_an_edited_preset(ssl_run, tmp_path: Path) -> None:
    preset = tmp_path / "mine" / "loss" / "short.yaml"
    preset.parent.mkdir(parents=True)
    text = "# @package _global_\ntau: {}\nloss:\n  _target_: ssl_runner.loss.SimCLR\n  tau: ${{tau}}\n"
    preset.write_text(text.format(0.2))
    with pytest.MonkeyPatch.context() as patch:
        preempt_after(4, patch)
        assert ssl_run(f"{COMMAND} --config-dir mine loss=short hydra.run.dir=1")[0] == 75
    preset.write_text(text.format(0.5))
    assert "Cannot change tau (0.2 -> 0.5)" in ssl_run("resume=1 tau=0.5")[2]
    assert ssl_run(f"{COMMAND} --config-dir mine loss=short resume=auto hydra.run.dir=1")[0] == 1
    code, _, err = ssl_run("resume=1")
    assert (code, err) == (0, "")
    assert config(tmp_path / "1").tau == 0.2


def test_removed_option_is_named(preempted: Path, ssl_run) -> None:
    removed = OmegaConf.merge(config(preempted), {"views_forward": "joint"})
    OmegaConf.save(removed, preempted / ".hydra" / "config.yaml")
    _, _, err = ssl_run("resume=mine")
    assert "resume=mine: this run has options of another version: views_forward was renamed" in err.replace(
        str(preempted), "mine"
    )


@pytest.mark.parametrize(
    ("error", "code", "status"), [(None, 75, "preempted"), (UsageError("no data"), 1, "failed")]
)
def test_resumed_run_that_ends_before_training_keeps_its_folder(
    preempted: Path, ssl_run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, status: str
) -> None:
    """It records how it ended."""
    before = {path: path.read_bytes() for path in (preempted / ".hydra").iterdir()}
    monkeypatch.setattr("ssl_runner.pipeline.build", raising(error))
    found, _, err = ssl_run("resume=mine tags=[x]")
    assert (found, record(preempted)["status"], record(preempted)["starts"]) == (code, status, 2)
    assert (f"resume={preempted}" in err) == (error is None)
    assert before == {path: path.read_bytes() for path in (preempted / ".hydra").iterdir()}
    assert (preempted / "checkpoint.pt").exists()


def test_caches_and_names_do_not_identify_a_run(preempted: Path, ssl_run) -> None:
    one = OmegaConf.create({"probe": {"cache": True}, "dataset": {"cache": "a"}, "seed": 0, "resume": None})
    other = OmegaConf.merge(one, {"probe": {"cache": False}, "dataset": {"cache": "b"}})
    named = OmegaConf.merge(one, {"tags": ["a"], "note": "b"})
    assert run_id(one) == run_id(other) == run_id(named)
    code, _, err = ssl_run("resume=mine probe.cache=false tags=[a] note='to the end'")
    assert (code, err) == (0, "")
    again = read_record(preempted / "run.json") | {"status": "preempted"}
    assert (again["tags"], again["note"]) == (["a"], "to the end")
    write_json(preempted / "run.json", again | {"note": "of .hydra"})
    code, _, err = ssl_run(rf"""resume='{preempted}' tags=[a,2] "note='to \${{x}}'" """)
    assert (code, err) == (0, "")
    lines = OmegaConf.to_container(OmegaConf.load(preempted / ".hydra" / "overrides.yaml"), resolve=False)
    named = [line for line in lines if line.startswith(("tags", "note", "probe.cache"))]
    assert sorted(named) == [r"note='to \${x}'", "probe.cache=false", "tags=[a,2]"]
    assert (config(preempted).tags, config(preempted).probe.cache) == (["a", 2], False)
    again = read_record(preempted / "run.json") | {"status": "preempted"}
    write_json(preempted / "run.json", again)
    code, out, err = ssl_run(f"{COMMAND} resume=auto hydra.run.dir='{preempted}'")
    assert (code, err) == (0, "")
    assert (record(preempted)["tags"], record(preempted)["note"]) == (["a", "2"], "to ${x}")
    code, out, err = ssl_run(f"{COMMAND} probe.cache=true tags=c resume=auto hydra.run.dir='{preempted}'")
    assert (code, err) == (0, "")
    assert "already done" in out
