"""Nothing is lost: runs that are asked to end, killed, or started twice; the sweeps that they belong to."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ssl_runner import checkpoint, cli, config
from ssl_runner.loss import VICReg
from ssl_runner.preemption import EXIT, Preempted, Preemption
from ssl_runner.relate import Neighbors
from ssl_runner.train import Pretraining
from tests.conftest import TINY, run_folder
from tests.test_end_to_end import start, table
from tests.test_train import pretraining, rows, weights


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


# --- the loop -----------------------------------------------------------------------------------------------------------------


class AskedAfter(Preemption):
    """Asks the run to end after some steps."""

    def __init__(self, training: Pretraining, step: int):
        super().__init__()
        self.training, self.step = training, step

    @property
    def asked(self):
        return signal.SIGTERM if self.training.step >= self.step else None

    @asked.setter
    def asked(self, value):
        pass


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_that_ends_after_any_step_goes_on_exactly(step: int, precision: str, tmp_path: Path) -> None:
    """Three epochs of three steps: within an epoch, at its end, after the last one; with a queue, dropout, a gradient scaler."""

    def fresh() -> Pretraining:
        return pretraining(VICReg(), Neighbors(2, queue=50), dropout=0.3, precision=precision)

    whole = fresh()
    expected = rows(whole)
    first = fresh()
    first.save = lambda state: checkpoint.save(state, tmp_path)
    first.preemption = AskedAfter(first, step)
    begun: list[dict] = []
    with pytest.raises(Preempted, match=f"preempted after step {step}"):
        begun.extend(first.epochs())
    second = fresh()
    second.load_state_dict(checkpoint.load(checkpoint.newest(tmp_path)))
    assert (second.step, second.epoch) == (step, (step - 1) // 3) == (first.step, len(begun))
    assert rows(second) == expected[len(begun) :]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name])


def test_a_checkpoint_within_an_epoch_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_runner.train.SAVE_AFTER", -1.0)
    expected = rows(pretraining())
    training, saved = pretraining(), []
    training.save = lambda state: saved.append((state["epoch"], state["step"]))
    assert rows(training) == expected
    assert [step for _, step in saved] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]


def test_a_signal_is_raised_at_once_or_where_the_loop_says_so() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Preemption() as preemption:
        with preemption.held():
            pass
        later = []
        with pytest.raises(Preempted, match="SIGUSR1"), preemption.held():
            later += [signal.raise_signal(signal.SIGUSR1), preemption.asked]
        assert later == [None, signal.SIGUSR1]
        signal.raise_signal(signal.SIGTERM)  # while the run is being closed
    with Preemption(), pytest.raises(Preempted, match="SIGTERM") as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == EXIT == 75
    assert signal.getsignal(signal.SIGUSR1) is before


def test_submitit_requeues_once_the_run_is_closed() -> None:
    """Its handler is called when the context is left; a second signal reaches it neither before nor meanwhile."""
    called = []

    def requeues(number: int, frame: object) -> None:
        called.append(number)
        signal.raise_signal(signal.SIGUSR2)
        raise SystemExit(-1)

    def run() -> None:
        with Preemption() as preemption, preemption.held():
            assert signal.getsignal(signal.SIGTERM) is term  # stays submitit's, which passes over it
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


# --- a run --------------------------------------------------------------------------------------------------------------------


def until(folder: Path, epochs: int, process: subprocess.Popen) -> None:
    """Waits until a run has written some rows."""
    while process.poll() is None and not (
        (folder / "metrics.csv").exists() and len(table(folder / "metrics.csv")) >= epochs
    ):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_end_saves_itself_and_goes_on(
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
    """The command, killed after so many seconds each time and started again, until it ends by itself. Each is a fork of this
    process, which has imported everything already."""
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
        _, ended = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(ended) != -signal.SIGKILL:
            assert os.waitstatus_to_exitcode(ended) == 0, (cwd / "output").read_text()
            return


@pytest.mark.slow
def test_twenty_runs_killed_at_random_end_as_the_one_that_was_not(tmp_path: Path, ssl_run) -> None:
    """Each is killed up to three times, at any moment from its start to its end, and started again with the same command. Weights
    are bit-identical, and so are the CSVs but for their timings."""
    command = f"{TINY} epochs=60 probe.every=10 diagnostics.every=10 diagnostics.images=40 resume=auto hydra.run.dir=run"
    moments, killed, took = random.Random(0), 0, 0.0
    for number in range(21):
        (tmp_path / str(number)).mkdir()
        began = time.monotonic()
        kills = [moments.uniform(0.02, 0.9 * took) for _ in range(moments.randint(1, 3))] if number else []
        killed_and_restarted(command, tmp_path / str(number), kills)
        took = took or time.monotonic() - began
    whole = tmp_path / "0" / "run"
    for number in range(1, 21):
        folder = tmp_path / str(number) / "run"
        assert status(folder) == "done"
        killed += json.loads((folder / "run.json").read_text())["starts"] - 1
        for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
            assert table(folder / name) == table(whole / name), (number, name)
        assert (folder / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
        ours, theirs = (checkpoint.load(checkpoint.newest(path)) for path in (folder, whole))
        for part in ("backbone", "projector"):
            assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert killed >= 20, "hardly any run was killed after it had begun"


def test_a_damaged_checkpoint_is_said_and_the_one_before_goes_on(ssl_run, tmp_path: Path) -> None:
    command = f"{TINY} epochs=4 resume=auto hydra.run.dir="
    whole = run_folder(ssl_run(f"{command}whole")[1])
    folder = run_folder(ssl_run(f"{command}mine")[1])
    unfinished(folder)
    with open(folder / "checkpoint.pt", "r+b") as file:
        file.truncate(1000)
    code, _, err = ssl_run(f"{command}mine")
    assert code == 0
    assert err == f"{folder / 'checkpoint.pt'} is damaged, not as it was written: passed over\n"
    for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
        assert table(folder / name) == table(whole / name)
    assert all(
        checkpoint.whole(folder / name) for name in ("checkpoint.pt", "checkpoint-before.pt")
    )  # the damaged one is neither

    unfinished(folder)
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        (folder / name).write_bytes(b"")
    before = (folder / "metrics.csv").read_bytes()
    code, _out, err = ssl_run(f"{command}mine")
    assert code == 1
    assert "no whole checkpoint to go on from: remove checkpoint.pt and checkpoint-before.pt" in err
    assert (folder / "metrics.csv").read_bytes() == before

    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        (folder / name).unlink()
    assert ssl_run(f"{command}mine")[0] == 0
    assert table(folder / "metrics.csv") == table(whole / "metrics.csv")


def unfinished(folder: Path, as_: str = "failed") -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": as_}))


def test_auto_takes_up_its_own_run_and_no_others(ssl_run, tmp_path: Path) -> None:
    """Runs that differ in the seed, in a loss's setting or in a default are others; a finished one is neither trained again nor
    touched; what is not there is begun."""
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
        assert out.startswith("done already")
    assert before == {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    code, out, err = ssl_run(f"{command} seed=1")
    assert (code, err) == (0, "")
    assert run_folder(out) == folders["seed=1"]
    assert json.loads((folders["seed=1"] / "run.json").read_text())["starts"] == 2
    assert len(list((tmp_path / "outputs").rglob("run.json"))) == 4

    code, out, err = ssl_run(f"{command} seed=2 hydra.run.dir={folders['']}")
    assert code == 1
    assert "already holds a run" in err


def test_the_identity_of_a_run_is_its_whole_configuration() -> None:
    one = OmegaConf.create({"a": 1, "b": {"c": "${a}", "d": [1, 2]}, "resume": None})
    same = OmegaConf.create({"b": {"d": [1, 2], "c": 1}, "resume": "auto", "a": 1})
    assert config.identity(one) == config.identity(same)
    for other in ({"a": 2}, {"b": {"c": 1, "d": [2, 1]}}, {"e": None}):
        assert config.identity(OmegaConf.merge(one, other)) != config.identity(one)


def test_a_job_that_slurm_puts_back_is_recognised_in_its_folder(
    ssl_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job, same folder, without resume=auto: it goes on, and a finished one is not trained again."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    command = f"{TINY} hydra.run.dir=mine"
    folder = run_folder(ssl_run(command)[1])
    unfinished(folder, "preempted")
    assert (
        "already holds a run" in ssl_run(command)[2]
    )  # a person who gives the same folder twice, in that job's shell
    sweep = f"-m {TINY} hydra.sweep.dir=swept"
    assert ssl_run(sweep)[0] == 0
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert "already holds a run" in ssl_run(sweep)[2]


# --- sweeps -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher", ["", pytest.param("hydra/launcher=joblib hydra.launcher.n_jobs=2", marks=pytest.mark.slow)]
)
def test_the_same_sweep_again_does_what_is_missing_or_failed(launcher: str, ssl_run, tmp_path: Path) -> None:
    command = f"-m {launcher} resume=auto optimizer.lr=0.001,1e30,0.002 {TINY} optimizer=sgd optimizer.warmup_epochs=0"
    code, _, _ = ssl_run(command)
    assert code == 1
    folders = sorted((path.parent for path in tmp_path.rglob("run.json")), key=lambda path: path.name)
    assert [status(folder) for folder in folders] == ["done", "failed", "done"]
    assert "not finite" in json.loads((folders[1] / "run.json").read_text())["error"]
    shutil.rmtree(folders[2])
    kept = (folders[0] / "run.json").read_bytes()

    code, _out, _err = ssl_run(command)
    assert code == 1
    again = {path.parent for path in tmp_path.rglob("run.json")}
    assert len(again) == 3
    assert {folders[0], folders[1]} < again
    assert (folders[0] / "run.json").read_bytes() == kept
    assert json.loads((folders[1] / "run.json").read_text())["starts"] == 2
    assert {status(folder) for folder in again - {folders[1]}} == {"done"}


def test_a_sweep_that_has_grown_keeps_the_runs_that_it_has(ssl_run, tmp_path: Path) -> None:
    """In a folder of its own, where the jobs' numbers now mean other settings."""
    command = f"-m resume=auto {TINY} hydra.sweep.dir=swept seed="
    assert ssl_run(f"{command}5,6")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "swept").rglob("run.json")}
    code, out, err = ssl_run(f"{command}4,5,6,7")
    assert (code, err) == (0, "")
    assert out.count("done already") == 2
    after = {path: path.read_bytes() for path in (tmp_path / "swept").rglob("run.json")}
    assert len(after) == 4
    assert before.items() <= after.items()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Optuna 2's own
def test_optuna_maximises_the_validation_accuracy(ssl_run, tmp_path: Path) -> None:
    """Its best value is the highest val_top1 among the trials; one that fails leaves the others."""
    search = "hydra/sweeper=optuna hydra.sweeper.n_trials=4 optimizer=sgd optimizer.warmup_epochs=0"
    code, _out, _err = ssl_run(
        f"-m {search} optimizer.lr=choice(1e30,0.0001,0.05) seed=range(0,9) hydra.sweep.dir=swept {TINY}"
    )
    records = [json.loads(path.read_text()) for path in (tmp_path / "swept").rglob("run.json")]
    assert len(records) == 4
    best = OmegaConf.load(tmp_path / "swept" / "optimization_results.yaml")
    assert best.best_value == max(record["val_top1"] for record in records if record["status"] == "done")
    assert code == (1 if any(record["status"] == "failed" for record in records) else 0)
