"""`ssl_runner.run` does what `ssl-run` does, and leaves no trace in the process."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pandas as pd
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import ssl_runner
from ssl_runner import api, build, pipeline
from ssl_runner.errors import UsageError
from ssl_runner.report.read import read_runs
from tests.helpers import TINY, make_pictures, run_folder, table

QUICK = f"{TINY} epochs=1 gamma=25".split()
PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_run_writes_what_the_command_line_writes(ssl_run, tmp_path: Path) -> None:
    commanded = run_folder(ssl_run(" ".join(QUICK))[1])
    result = ssl_runner.run(*QUICK)
    assert result.folder.parent == commanded.parent == tmp_path / "outputs" / "mnist5k" / "vicreg"
    assert files(result.folder) == files(commanded)
    for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
        assert table(result.folder / name) == table(commanded / name)
    for name in ("backbone.safetensors", ".hydra/config.yaml", ".hydra/overrides.yaml"):
        assert (result.folder / name).read_bytes() == (commanded / name).read_bytes()
    ours, theirs = (read_runs([folder], tmp_path / "report")[0] for folder in (result.folder, commanded))
    assert ours.overrides == theirs.overrides
    assert ours.overrides["gamma"] == "25"
    assert (ours.config, ours.choices, ours.status) == (theirs.config, theirs.choices, "done")


def test_result_holds_the_tables_and_the_accuracy(tmp_path: Path) -> None:
    result = ssl_runner.run(*QUICK, folder="mine")
    assert result.folder == tmp_path / "mine"
    pd.testing.assert_frame_equal(result.metrics, pd.read_csv(tmp_path / "mine" / "metrics.csv"))
    assert result.probes.top1.tolist() == [result.result["val_top1"], result.result["top1"]]
    assert result.result["loss"] == result.metrics.loss.iloc[-1]


@pytest.mark.slow
def test_runs_follow_each_other_in_one_process() -> None:
    """A loop is a sweep. With resume=auto a finished run is not repeated; another folder can be resumed."""
    results = [ssl_runner.run(*QUICK, f"seed={seed}", "resume=auto") for seed in (0, 1, 0)]
    assert results[0].folder == results[2].folder != results[1].folder
    assert results[0].result == results[2].result
    longer = ssl_runner.run(f"resume={results[1].folder}", "epochs=2")
    assert longer.folder == results[1].folder
    assert longer.metrics.epoch.tolist() == [1, 2]


def test_run_restores_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Hydra, signal handlers, environment and working directory, also after an error."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    OmegaConf.register_new_resolver("unique", lambda: "mine", replace=True)
    ConfigStore.instance().store("mine", {"a": 1})
    handlers = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGUSR1)]
    environment = dict(os.environ)
    hydra_config = HydraConfig.instance().cfg
    try:
        with hydra.initialize(config_path=None, version_base="1.2"):
            first = ssl_runner.run(*QUICK)
            with pytest.raises(UsageError):
                ssl_runner.run("nothing=1")
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")
            ssl_runner.run(f"resume={first.folder}", "epochs=2")
            assert Path.cwd() == tmp_path / "elsewhere"
            assert GlobalHydra.instance().is_initialized()
            assert hydra.compose("mine").a == 1
        assert OmegaConf.create({"a": "${unique:}"}).a == "mine"
    finally:
        OmegaConf.clear_resolver("unique")
        ConfigStore.instance().repo.pop("mine.yaml")
    assert HydraConfig.instance().cfg == hydra_config
    assert dict(os.environ) == environment
    assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGUSR1)] == handlers


@pytest.mark.parametrize(
    ("overrides", "folder", "message"),
    [
        (["tau=0.1"], None, "tau is an option of loss=simclr, not of loss=vicreg"),
        (["gamma=1,5"], None, "gamma=1,5 is a sweep"),
        (["--config-dir=a"], None, "--config-dir=a: expected the argument config_dir"),
        ([3], None, "run: expected overrides as strings, such as 'epochs=5', found 3"),
        (["-m"], None, "-m: expected <group>=<name> or <key>=<value>; write a sweep as a loop"),
        (["hydra.mode=MULTIRUN"], None, "write a sweep as a loop"),
        (["resume=a", "resume=b"], None, "resume is given twice"),
        (["resume=nowhere"], None, "nowhere: expected the folder of a run"),
        (["hydra.run.dir=a"], "b", "folder=b: expected no folder together with hydra.run.dir=a"),
        (["probe.keep=best"], None, "probe.keep=best: expected probe.every >= 1"),
        (
            ["batch_size=5000"],
            None,
            "batch_size=5000: expected at most 3600, the pretraining images of mnist5k",
        ),
    ],
)
def test_invalid_input_raises_what_the_command_line_prints(
    overrides: list[str], folder: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        ssl_runner.run(*overrides, folder=folder)
    assert capsys.readouterr() == ("", "")


def test_unlabelled_images_give_an_empty_table_of_probes(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 30, 0, 24)
    options = [option for option in QUICK if not option.startswith(("dataset.", "probe."))]
    images = ["dataset=folder", "dataset.root=pictures", "dataset.labels=false", "batch_size=20"]
    result = ssl_runner.run(*options, *images, f"dataset.cache={tmp_path}/cache")
    assert result.probes.empty
    assert len(result.metrics) == 1
    assert result.result["top1"] is None


def test_run_in_a_folder_of_any_name_is_extended_and_errors_name_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my data (1), 'a'=b" / "2"
    ssl_runner.run(*QUICK, folder=folder)
    longer = ssl_runner.run("epochs=2", resume=folder)
    assert longer.folder == folder
    assert longer.metrics.epoch.tolist() == [1, 2]
    with pytest.raises(UsageError, match="expected more than the 2 epochs") as error:
        ssl_runner.run("epochs=1", resume=folder)
    assert error.value.__notes__ == [f"folder of the run: {folder}"]


def test_second_run_at_the_same_time_is_rejected() -> None:
    with api.RUNNING, pytest.raises(UsageError, match="one run at a time in a process"):
        ssl_runner.run(*QUICK)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ssl_runner.run(*QUICK, folder="~/mine").folder == tmp_path / "mine"


def test_folder_with_a_run_is_rejected(tmp_path: Path) -> None:
    ssl_runner.run(*QUICK, folder="a, 'b'=c")
    with pytest.raises(UsageError, match="already contains a run"):
        ssl_runner.run(*QUICK, folder="a, 'b'=c")
    assert [path.name for path in tmp_path.iterdir()] == ["a, 'b'=c"]


def test_configs_of_the_user_are_found(tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\ngamma: 7\n")
    result = ssl_runner.run(*QUICK[:-1], "experiment=mine", config_dir="own")
    assert OmegaConf.load(result.folder / ".hydra" / "config.yaml").gamma == 7


def test_sweep_of_an_experiment_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_jobs", lambda jobs: pytest.fail("built the jobs"))
    with pytest.raises(UsageError, match=r"the experiment sweeps \(21 jobs"):
        ssl_runner.run("experiment=rank_vs_gamma")


def test_name_is_the_function_and_import_is_light() -> None:
    assert ssl_runner.run is api.run
    assert pipeline.run is not api.run
    assert "run" in dir(ssl_runner)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ssl_runner.nothing
    slow = "{'torch', 'hydra', 'omegaconf', 'pandas', 'numpy'}"
    code = f"import sys, ssl_runner; print({slow} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.slow
def test_snippets_of_the_page_run(tmp_path: Path) -> None:
    """In order, in one namespace, as the cells of a notebook."""
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        tiny = snippet.replace('"epochs=20", "dataset.subset=500"', f"*{TINY.split()}")
        exec(tiny.replace("epochs=40", "epochs=3"), names)
    assert len(list(tmp_path.glob("outputs/mnist5k/vicreg/*/run.json"))) == 2  # gamma=25 exists already
