"""What ends before training leaves no run folder, and nothing else is removed."""

from pathlib import Path
from typing import Any

import pytest

import ssl_runner
from ssl_runner import pipeline
from ssl_runner.errors import UsageError
from tests.helpers import TINY, raising, run_folder

REFUSED = f"{TINY} relation=edges relation.path=none.csv"
MESSAGE = "relation.path=none.csv: expected an existing file"


def tree(folder: Path) -> set[str]:
    """The paths below a folder, without those of data sets."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith("data")}


@pytest.fixture
def existing(tmp_path: Path) -> set[str]:
    """Files and folders of a user."""
    (tmp_path / "mine").mkdir()
    for name in ("notes.txt", ".lock", "ssl-run.log"):
        (tmp_path / "mine" / name).write_text("kept")
    (tmp_path / "mine" / "empty").mkdir()
    return tree(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "resume=auto",
        "hydra.run.dir=mine",
        "hydra.run.dir=mine/../mine/empty",
        "hydra.run.dir=mine/new hydra.job.chdir=true",
        "hydra.run.dir=.",
    ],
)
def test_refused_run_leaves_what_there_was(ssl_run, tmp_path: Path, existing: set[str], options: str) -> None:
    code, out, err = ssl_run(f"{REFUSED} {options}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert MESSAGE in err
    assert tree(tmp_path) == existing
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("name", [".hydra/config.yaml", "metrics.csv", "views.png"])
def test_folder_with_files_that_a_run_would_overwrite_is_refused(ssl_run, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("kept")
    code, out, err = ssl_run(f"{TINY} hydra.run.dir=mine")
    assert (code, out) == (1, "")
    assert f"contains {name.partition('/')[0]}, which a run would overwrite: choose another folder" in err
    assert (tmp_path / "mine" / name).read_text() == "kept"
    assert tree(tmp_path) == {"mine", f"mine/{name}", str(Path(f"mine/{name}").parent)}


def test_run_is_found_before_it_trains(ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process with resume=auto refuses to train the same run while the first reads its data."""
    build, found = pipeline.build, []

    def slow_build(*args: Any, **options: Any) -> Any:
        found.extend(tmp_path.rglob("run.json"))
        return build(*args, **options)

    monkeypatch.setattr("ssl_runner.pipeline.build", slow_build)
    folder = run_folder(ssl_run(TINY)[1])
    assert found == [folder / "run.json"]


def test_refused_run_from_python_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (None, "mine/new", "mine/empty"):
        with pytest.raises(UsageError, match=MESSAGE) as error:
            ssl_runner.run(*REFUSED.split(), folder=folder)
        assert not hasattr(error.value, "__notes__")
        assert tree(tmp_path) == existing


def test_refused_job_leaves_the_folder_of_the_sweep(ssl_run, tmp_path: Path) -> None:
    """With a launcher on the command line the jobs are not built ahead."""
    code, out, err = ssl_run(f"-m hydra/launcher=basic hydra.sweep.dir=swept {REFUSED} seed=0,1")
    assert (code, out) == (1, f"sweep: 2 jobs\nsweep={tmp_path}/swept\njob #0 (seed=0)\njob #1 (seed=1)\n")
    assert err.startswith(f"job #0 (seed=0): {MESSAGE}")
    assert err.splitlines()[2] == "failed sweep jobs (2): #0 (seed=0); #1 (seed=1)"
    assert tree(tmp_path) == {"swept", "swept/multirun.yaml"}


ENDS = [
    (None, 75, "preempted by SIGTERM before the run began; repeat the command\n"),
    (KeyboardInterrupt(), 130, "interrupted before the run began; repeat the command\n"),
    (KeyError("width"), 1, "KeyError: 'width'\n"),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=["signal", "interrupt", "error"])
def test_run_that_ends_before_training_says_so_and_leaves_nothing(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr("ssl_runner.pipeline.build", raising(error))
    found, out, err = ssl_run(f"{TINY} hydra.run.dir=new")
    assert (found, out, err.endswith(line)) == (code, "", True)
    assert err == line or (isinstance(error, KeyError) and "in call" in err)  # with its traceback
    assert tree(tmp_path) == set()


def test_interrupted_run_is_named(ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_runner.pipeline.compile_solver", raising(KeyboardInterrupt()))
    code, _, err = ssl_run(f"{TINY} hydra.run.dir=a/b")
    line = f"resume={tmp_path}/a/b, or the same command with resume=auto\n"
    assert (code, err) == (130, f"interrupted; the run can be resumed: {line}")


def test_signal_while_torch_is_imported_leaves_nothing(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_runner.distributed.start", raising(None))
    code, out, err = ssl_run(f"{TINY} hydra.run.dir=new")
    assert (code, out) == (75, "")
    assert err.startswith("preempted by SIGTERM; repeat the command")
    assert tree(tmp_path) == set()


def test_failure_of_another_rank_before_the_run_begins_leaves_nothing(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watching thread of rank 0 ends the process while its main thread waits for the other rank."""
    handlers: list[Any] = []
    monkeypatch.setattr("ssl_runner.distributed.on_peer_failure", handlers.append)

    def run(*_options: Any) -> None:
        assert (tmp_path / "new" / ".lock").exists()
        handlers.pop()(1, "rank 1 of 2: killed")
        assert tree(tmp_path) == set()
        raise UsageError("ended")

    monkeypatch.setattr("ssl_runner.pipeline.run", run)
    assert ssl_run(f"{TINY} hydra.run.dir=new")[::2] == (1, "ended\n")
    assert handlers == []


def test_signal_after_the_failure_of_another_rank_is_reported_as_that_failure(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun, which then sends SIGTERM to rank 0."""
    cause = "rank 1 of 2: ImportError: no such module"
    monkeypatch.setattr("ssl_runner.distributed.report_failure", lambda error: (1, cause))
    monkeypatch.setattr("ssl_runner.pipeline.run", raising(None))
    assert ssl_run(f"{TINY} hydra.run.dir=new") == (1, "", f"{cause}\n")
    assert tree(tmp_path) == set()
