"""Preemption, crashes and resuming, of single runs and of sweeps."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ssl_runner import cli, distributed, train
from ssl_runner.background import Background
from ssl_runner.config.run_id import run_id
from ssl_runner.loss import SIGReg, VICReg
from ssl_runner.preemption import EXIT, Preempted, Preemption
from ssl_runner.relation.builders import FromNeighbors
from ssl_runner.runs import checkpoint
from ssl_runner.runs.files import write_json
from ssl_runner.runs.record import RunRecord
from ssl_runner.solver import Save
from ssl_runner.train import Pretraining
from tests.helpers import TINY, pretraining, rows, run_folder, start, table, weights


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


# --- training loop ----------------------------------------------------------------------------------------


class AskedAfter(Preemption):
    """Request preemption after a given number of steps."""

    def __init__(self, training: Pretraining, step: int):
        super().__init__()
        self.training, self.step = training, step

    @property
    def received(self):
        return signal.SIGTERM if self.training.step >= self.step else None

    @received.setter
    def received(self, value):
        pass


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("step", range(1, 10))
def test_preempted_training_resumes_exactly(step: int, precision: str, tmp_path: Path) -> None:
    """Three epochs of three steps, with queue, dropout and gradient scaler; in fp16 a random loss.

    The steps cover the middle of an epoch, the end of an epoch and the end of training.
    """

    def fresh() -> Pretraining:
        loss = SIGReg() if precision == "fp16" else VICReg()
        return pretraining(loss, FromNeighbors(2, queue=50), dropout=0.3, precision=precision)

    torch.manual_seed(0)
    uninterrupted = fresh()
    expected = rows(uninterrupted)
    torch.manual_seed(0)
    first = fresh()
    first.save = lambda state, how: checkpoint.save(state, tmp_path)
    first.preemption = AskedAfter(first, step)
    completed: list[dict] = []
    with pytest.raises(Preempted, match=f"preempted after step {step}"):
        completed.extend(first.epochs())
    second = fresh()
    second.load_state_dict(checkpoint.load(checkpoint.find(tmp_path)))
    assert (second.step, second.epoch) == (step, (step - 1) // 3) == (first.step, len(completed))
    assert rows(second) == expected[len(completed) :]
    for name, value in weights(uninterrupted).items():
        assert torch.equal(value, weights(second)[name])


def test_checkpoint_within_epoch_does_not_change_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_runner.train.SAVE_INTERVAL", -1.0)
    expected = rows(pretraining())
    training, saved = pretraining(), []
    training.save = lambda state, how: saved.append((how, state["step"]))
    assert rows(training) == expected
    assert saved == [(Save.WRITE, step) for step in (1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9)]


def test_checkpoint_is_written_once_a_minute_and_after_the_last_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six epochs of three steps of 17 s. The state at the end of an epoch is held."""
    now, training, saved = [0.0], pretraining(epochs=6), []
    step = training._step

    def step_of_17_seconds(*args):
        now[0] += 17.0
        return step(*args)

    training._step = step_of_17_seconds
    training.save = lambda state, how: saved.append((how.name, state["step"]))
    monkeypatch.setattr("ssl_runner.train.time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows(training)
    written, held = ([step for how, step in saved if how == of] for of in (Save.WRITE.name, Save.HOLD.name))
    assert written == [4, 8, 12, 16, 18]
    assert held == [3, 6, 9, 12, 15]


def test_signal_raises_at_once_or_at_end_of_deferred() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Preemption() as preemption:
        with preemption.deferred():
            pass
        events = []
        with pytest.raises(Preempted, match="SIGUSR1"), preemption.deferred():
            events += [signal.raise_signal(signal.SIGUSR1), preemption.received]
        assert events == [None, signal.SIGUSR1]
        signal.raise_signal(signal.SIGTERM)  # ignored during shutdown
    with Preemption(), pytest.raises(Preempted, match="SIGTERM") as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == EXIT == 75
    assert signal.getsignal(signal.SIGUSR1) is before


class Failed(Exception):
    """The error of a run during which a signal arrives."""


def failing(folder: Path) -> None:
    """A run that fails as in `pipeline.run`, within the context of `cli.main`."""
    with (
        Preemption(),
        Preemption() as preemption,
        RunRecord(folder, "x") as record,
        distributed.propagate_failures(record.fail),
        Background() as background,
        checkpoint.Writer(folder, background) as writer,
        preemption.deferred(),
    ):
        record.begin()
        writer.hold({"a": torch.ones(2)})
        raise Failed("the cause")


def test_signal_at_any_line_does_not_replace_the_error_of_a_failing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM before the n-th line of Python that is executed after the error, for every n."""
    monkeypatch.setattr("ssl_runner.preemption.RETRY_INTERVAL", 60)  # no repetition
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("ssl_runner.runs.record.git_commit", lambda: None)
    monkeypatch.setattr("ssl_runner.runs.record.version", lambda name: "")
    n, lines = 0, 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
        nonlocal lines
        if event == "line" and sys.exception() is not None:
            lines += 1
            if lines == n:
                signal.raise_signal(signal.SIGTERM)
        return trace if "ssl_runner" in frame.f_code.co_filename else None

    original, before = signal.signal(signal.SIGTERM, signal.SIG_IGN), sys.gettrace()
    while lines >= n:
        n, lines = n + 1, 0
        sys.settrace(trace)
        try:
            with pytest.raises(Failed, match="the cause"):
                failing(tmp_path)
        finally:
            sys.settrace(before)
        record = json.loads((tmp_path / "run.json").read_text())
        assert (record["status"], record["error"]) == ("failed", "Failed: the cause"), n
    signal.signal(signal.SIGTERM, original)
    assert n > 30
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def handled_failure(nested: bool) -> None:
    """A job of a sweep that fails, and the next job. The first receives a signal while it fails."""
    try:
        with Preemption() if nested else nullcontext():
            try:
                raise Failed
            finally:
                signal.raise_signal(signal.SIGTERM)
    except Failed:
        pass
    else:
        pytest.fail("the signal replaced the failure")
    time.sleep(30)


@pytest.mark.parametrize("nested", [False, True])
def test_signal_while_an_exception_is_handled_is_raised_afterwards(nested: bool) -> None:
    start = time.monotonic()
    with Preemption(), pytest.raises(Preempted, match="SIGTERM"):
        handled_failure(nested)
    assert time.monotonic() - start < 20


def failure_in_a_step() -> None:
    """A job of a sweep that receives a signal in a step, which then fails, and the next job."""
    with suppress(Failed), Preemption() as run, run.deferred():
        signal.raise_signal(signal.SIGTERM)
        raise Failed
    time.sleep(30)


def test_signal_in_a_step_that_fails_ends_the_sweep() -> None:
    start = time.monotonic()
    with Preemption(), pytest.raises(Preempted, match="SIGTERM"):
        failure_in_a_step()
    assert time.monotonic() - start < 20


def test_signal_while_done_is_recorded_leaves_the_run_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, content: dict) -> None:
        if content["status"] == "done":
            signal.raise_signal(signal.SIGTERM)
        write_json(path, content)

    monkeypatch.setattr("ssl_runner.runs.record.write_json", write)
    with pytest.raises(Preempted) as raised, Preemption(), RunRecord(tmp_path, "x") as record:
        record.begin()
    assert status(tmp_path) == "done"
    after = f"preempted by SIGTERM after the end of the run; run={tmp_path}"
    assert cli.stopped_line(str(raised.value), tmp_path) == after
    line = cli.stopped_line(str(raised.value), tmp_path / "other")
    assert line == "preempted by SIGTERM before the run began; repeat the command"


def test_submitit_handler_runs_once_on_exit() -> None:
    """It runs when the context exits. Another signal calls it neither before nor during this.

    Nor does the signal end its child process: Slurm signals all processes of a job step, scontrol included.
    """
    called = []

    def requeues(number: int, frame: object) -> None:
        called.append(number)
        signal.raise_signal(signal.SIGUSR2)
        kill = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"
        subprocess.run([sys.executable, "-c", kill], check=True)
        raise SystemExit(-1)

    def run() -> None:
        with Preemption() as preemption, preemption.deferred():
            assert signal.getsignal(signal.SIGTERM) is term  # submitit keeps SIGTERM, which it ignores
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
            assert called == []

    requeues.__module__ = "submitit.core.job_environment"
    term, before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGUSR2, requeues)
    try:
        with pytest.raises(SystemExit) as ended:
            run()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ended.value.code == -1
    assert called == [signal.SIGUSR2]


# --- single runs ------------------------------------------------------------------------------------------


def until(folder: Path, epochs: int, process: subprocess.Popen) -> None:
    """Wait until a run has written `epochs` rows, or has ended."""
    while process.poll() is None and not (
        (folder / "metrics.csv").exists() and len(table(folder / "metrics.csv")) >= epochs
    ):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_run_stopped_by_signal_saves_checkpoint_and_resumes(
    which: signal.Signals, ssl_run, tmp_path: Path
) -> None:
    command = f"{TINY} epochs=80 probe.every=20 resume=auto hydra.run.dir="
    process = start(f"{command}mine", tmp_path)
    folder = tmp_path / "mine"
    until(folder, 5, process)
    process.send_signal(which)
    _, err = process.communicate()
    assert process.returncode == 75
    assert err.count("\n") == 1
    assert f"resume={folder}" in err
    assert status(folder) == "preempted"
    assert checkpoint.load(folder / "checkpoint.pt")["step"] < 240

    code, out, err = ssl_run(f"{command}mine")
    assert (code, err) == (0, "")
    assert run_folder(out) == folder
    assert status(folder) == "done"
    whole = run_folder(ssl_run(f"{command}whole")[1])
    for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
        assert table(folder / name) == table(whole / name)


def killed_and_restarted(command: str, cwd: Path, kills: list[float]) -> None:
    """Start a command, kill it after kills[0] seconds, restart it, and so on, until it ends by itself.

    Each child is forked from this process, so it needs no imports.
    """
    for seconds in [*kills, None]:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.chdir(cwd)
                for stream in (1, 2):
                    os.dup2(os.open(cwd / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
                os.environ.pop("PYTEST_CURRENT_TEST", None)
                sys.argv = ["ssl-run", *shlex.split(command)]
                torch.set_num_threads(1)
                cli.main()
                code = 0
            except SystemExit as exit_:
                code = int(exit_.code or 0)
            finally:
                os._exit(code)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, wait_status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(wait_status) != -signal.SIGKILL:
            assert os.waitstatus_to_exitcode(wait_status) == 0, (cwd / "output").read_text()
            return


def kill_runs() -> None:
    """Start a run that fills the caches, and 13 runs in folders 0 to 12; kill 1 to 12 at random times."""
    train.SAVE_INTERVAL = 0.05
    command = (
        f"{TINY} epochs=60 probe.every=10 diagnostics.every=10 diagnostics.num_images=40 resume=auto"
        " hydra.run.dir=run +evaluators.norm._target_=tests.helpers.NormInBackground"
    )
    rng, duration = random.Random(0), 0.0
    for number in range(-1, 13):
        folder = Path.cwd() / str(number)
        folder.mkdir()
        began = time.monotonic()
        kills = [rng.uniform(0.02, 0.9 * duration) for _ in range(rng.randint(2, 4))] if number > 0 else []
        killed_and_restarted(command, folder, kills)
        duration = time.monotonic() - began if number <= 0 else duration


@pytest.mark.slow
def test_runs_killed_at_random_times_match_uninterrupted_run(tmp_path: Path) -> None:
    """Twelve runs are each killed at most two to four times, at random, and restarted with the same command.

    Weights are bit-identical, and so are the CSVs apart from timings. Checkpoints are written every 50 ms.
    One column of metrics.csv is computed in the background. A process of its own forks the runs.
    """
    start = [sys.executable, "-c", "from tests.test_resume import kill_runs; kill_runs()"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(start, cwd=tmp_path, env=env, check=True)
    restarts = 0
    whole = tmp_path / "0" / "run"
    for number in range(1, 13):
        folder = tmp_path / str(number) / "run"
        assert status(folder) == "done"
        restarts += json.loads((folder / "run.json").read_text())["starts"] - 1
        for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
            assert table(folder / name) == table(whole / name), (number, name)
        assert (folder / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
        ours, theirs = (checkpoint.load(checkpoint.find(path)) for path in (folder, whole))
        for part in ("backbone", "projector"):
            assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert restarts >= 12, "too few runs were killed after they had started training"


def test_damaged_checkpoint_is_reported_and_run_resumes_from_previous(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_runner.train.SAVE_INTERVAL", 0.0)
    command = f"{TINY} epochs=4 resume=auto hydra.run.dir="
    whole = run_folder(ssl_run(f"{command}whole")[1])
    folder = run_folder(ssl_run(f"{command}mine")[1])
    unfinished(folder)
    with open(folder / "checkpoint.pt", "r+b") as file:
        file.truncate(1000)
    code, out, err = ssl_run(f"{command}mine")
    assert code == 0
    assert "\nresumed after 4 of 4 epochs\n" in out
    assert err == f"{folder / 'checkpoint.pt'} is damaged (SHA-256 mismatch): skipped\n"
    for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
        assert table(folder / name) == table(whole / name)
    assert all(
        checkpoint.is_intact(folder / name) for name in ("checkpoint.pt", "checkpoint-before.pt")
    )  # neither is the damaged one

    unfinished(folder)
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        (folder / name).write_bytes(b"")
    before = (folder / "metrics.csv").read_bytes()
    code, _out, err = ssl_run(f"{command}mine")
    assert code == 1
    assert "no intact checkpoint to resume from: remove checkpoint.pt and checkpoint-before.pt" in err
    assert (folder / "metrics.csv").read_bytes() == before

    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        (folder / name).unlink()
    assert ssl_run(f"{command}mine")[0] == 0
    assert table(folder / "metrics.csv") == table(whole / "metrics.csv")


def unfinished(folder: Path, as_: str = "failed") -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": as_}))


def test_resume_auto_finds_run_with_same_configuration(ssl_run, tmp_path: Path) -> None:
    """A different seed, loss option or default makes a different run.

    A finished run is not trained again and its files do not change. A missing run is started.
    """
    command = f"{TINY} resume=auto"
    folders = {}
    for settings in ("", "seed=1", "gamma=7", "optimizer.weight_decay=0.5"):
        code, out, err = ssl_run(f"{command} {settings}")
        assert (code, err) == (0, "")
        folders[settings] = run_folder(out)
    assert len(set(folders.values())) == 4
    unfinished(folders["seed=1"])
    before = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    for settings in ("", "gamma=7.0", "optimizer.weight_decay=0.5"):
        code, out, err = ssl_run(f"{command} {settings}")
        assert (code, err) == (0, "")
        assert run_folder(out) == folders[settings.replace("7.0", "7")]
        assert out.startswith("already done")
    assert before == {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    code, out, err = ssl_run(f"{command} seed=1")
    assert (code, err) == (0, "")
    assert run_folder(out) == folders["seed=1"]
    assert json.loads((folders["seed=1"] / "run.json").read_text())["starts"] == 2
    assert len(list((tmp_path / "outputs").rglob("run.json"))) == 4

    code, out, err = ssl_run(f"{command} seed=2 hydra.run.dir={folders['']}")
    assert code == 1
    assert "already contains a run" in err


def test_identity_depends_on_whole_configuration_except_resume_and_logger() -> None:
    one = OmegaConf.create({"a": 1, "b": {"c": "${a}", "d": [1, 2]}, "resume": None})
    same = OmegaConf.create(
        {"b": {"d": [1, 2], "c": 1}, "resume": "auto", "a": 1, "logger": {"_target_": "my.Logger"}}
    )
    assert run_id(one) == run_id(same)
    for other in ({"a": 2}, {"b": {"c": 1, "d": [2, 1]}}, {"e": None}):
        assert run_id(OmegaConf.merge(one, other)) != run_id(one)


def test_folder_with_run_is_rejected_within_slurm_jobs(ssl_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without resume=auto, a command that names the folder of a run fails, in the same job and in another."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    command = f"{TINY} hydra.run.dir=mine"
    folder = run_folder(ssl_run(command)[1])
    unfinished(folder, "preempted")
    assert (
        "a run: choose another folder, or resume it with resume=mine" in ssl_run(command)[2]
    )  # an interactive command in the shell of the job
    sweep = f"-m {TINY} hydra.sweep.dir=swept"
    assert ssl_run(sweep)[0] == 0
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert "already contains a run" in ssl_run(sweep)[2]


# --- sweeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher", ["", pytest.param("hydra/launcher=joblib hydra.launcher.n_jobs=2", marks=pytest.mark.slow)]
)
def test_repeated_sweep_runs_only_missing_or_failed_jobs(launcher: str, ssl_run, tmp_path: Path) -> None:
    command = (
        f"-m {launcher} resume=auto optimizer.lr=0.001,1e30,0.002 {TINY} optimizer=sgd"
        " optimizer.warmup_epochs=0"
    )
    code, _, _ = ssl_run(command)
    assert code == 1
    folders = sorted((path.parent for path in tmp_path.rglob("run.json")), key=lambda path: path.name)
    assert [status(folder) for folder in folders] == ["done", "failed", "done"]
    assert "not finite" in json.loads((folders[1] / "run.json").read_text())["error"]
    shutil.rmtree(folders[2])
    kept = (folders[0] / "run.json").read_bytes()

    code, out, _ = ssl_run(command)
    assert code == 1
    assert "\njobs done before: 1 of 3\n" in out
    again = {path.parent for path in tmp_path.rglob("run.json")}
    assert len(again) == 3
    assert {folders[0], folders[1]} < again
    assert (folders[0] / "run.json").read_bytes() == kept
    assert json.loads((folders[1] / "run.json").read_text())["starts"] == 2
    assert {status(folder) for folder in again - {folders[1]}} == {"done"}


@pytest.mark.slow
def test_extended_sweep_keeps_existing_runs(ssl_run, tmp_path: Path) -> None:
    """The sweep folder is the same, but its job numbers now refer to other configurations."""
    command = f"-m resume=auto {TINY} hydra.sweep.dir=swept seed="
    assert ssl_run(f"{command}5,6")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "swept").rglob("run.json")}
    code, out, err = ssl_run(f"{command}4,5,6,7")
    assert (code, err) == (0, "")
    assert out.count("already done") == 2
    assert out.endswith("\njobs done before: 2 of 4\nall jobs are done\n")
    after = {path: path.read_bytes() for path in (tmp_path / "swept").rglob("run.json")}
    assert len(after) == 4
    assert before.items() <= after.items()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # warnings of Optuna 2
def test_optuna_maximises_validation_accuracy(ssl_run, tmp_path: Path) -> None:
    """The best value is the highest val_top1 of all trials. A failed trial does not affect the others."""
    search = "hydra/sweeper=optuna hydra.sweeper.n_trials=4 optimizer=sgd optimizer.warmup_epochs=0"
    code, _out, err = ssl_run(
        f"-m {search} optimizer.lr=choice(1e30,0.0001,0.05) seed=range(0,9) hydra.sweep.dir=swept {TINY}"
    )
    assert "float-castable" not in err
    records = [json.loads(path.read_text()) for path in (tmp_path / "swept").rglob("run.json")]
    assert len(records) == 4
    best = OmegaConf.load(tmp_path / "swept" / "optimization_results.yaml")
    assert best.best_value == max(record["val_top1"] for record in records if record["status"] == "done")
    assert code == (1 if any(record["status"] == "failed" for record in records) else 0)
