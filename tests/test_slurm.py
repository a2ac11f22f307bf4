"""Tests on a Slurm cluster: job arrays, several processes, preemption and time limits.

Other jobs may run on the cluster at the same time.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from ssl_runner.runs.files import read_json
from tests.helpers import TINY, complete_rows, table

SCRIPT = Path(__file__).parent.parent / "scripts" / "slurm" / "train.sbatch"
# few steps, so that rounding errors stay small
SLOW = f"{TINY} epochs=20 dataset.subset=2000 batch_size=400 V=4 gamma=25 optimizer.lr=0.0001"


def no_slurm() -> str:
    """Return why Slurm cannot be used here, or an empty string if it can."""
    if "SLURM_CONF" not in os.environ:
        return "SLURM_CONF is not set"
    try:
        subprocess.run(["sinfo"], capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no usable Slurm: {error}"
    return ""


reason = no_slurm()
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]


class Cluster:
    """Start commands in the folder `cwd`; their Slurm jobs all have the name `name`."""

    def __init__(self, cwd: Path):
        self.cwd, self.name, self.processes = cwd, f"test-{uuid.uuid4().hex[:8]}", list[subprocess.Popen]()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name == "SLURM_CONF" or not of_a_launcher(name)
        }
        self.env = inherited | {
            "OMP_NUM_THREADS": "1",
            "SSL_RUN": sys.executable,
            "SSL_RUNNER_DATA": str(cwd / "data"),
        }

    def start(self, command: str) -> subprocess.Popen:
        """Start ssl-run with a command line. Its output goes to the file `printed`."""
        words = [sys.executable, "-m", "ssl_runner", *command.split()]
        with open(self.cwd / "printed", "a") as printed:
            process = subprocess.Popen(
                words, cwd=self.cwd, env=self.env, stdout=printed, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def sweep(self, command: str) -> subprocess.Popen:
        """Start a sweep as a Slurm job array with one CPU per process."""
        launcher = f"hydra/launcher=slurm hydra.launcher.name={self.name} hydra.launcher.cpus_per_task=1"
        return self.start(f"-m {launcher} {command}")

    def slurm(self, *words: str) -> str:
        return subprocess.run(
            words, cwd=self.cwd, env=self.env, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def alive(self) -> bool:
        """Return whether any job is pending, running or completing."""
        return bool(self.slurm("squeue", "--noheader", f"--name={self.name}"))

    def signal(self, which: str, folders: list[Path], rows: int = 10) -> None:
        """Send a signal to the training processes of each folder once it has `rows` rows in metrics.csv.

        The signal goes to the job step. If it were sent to the job, scancel might repeat it half a minute
        later, when the job has already restarted.
        """
        remaining = list(folders)

        def sent() -> bool:
            for folder in [
                folder for folder in remaining if len(complete_rows(folder / "metrics.csv")) >= rows
            ]:
                self.slurm("scancel", f"--signal={which}", read_json(folder / "run.json")["slurm_job"] + ".0")
                remaining.remove(folder)
            return not remaining

        self.until(sent)

    def until(self, what: Callable[[], bool], seconds: float = 200) -> None:
        """Wait until what() is true. After `seconds`, fail and show all output and logs."""
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                logs = [*self.cwd.glob("printed"), *self.cwd.rglob("*.out")]
                pytest.fail("\n".join(["timeout", *(f"{log}:\n{log.read_text()}" for log in logs)]))
            time.sleep(0.2)

    def ended(self, process: subprocess.Popen) -> int:
        """Wait for a process and return its exit code."""
        self.until(lambda: process.poll() is not None)
        return process.returncode

    def alone(self, command: str) -> None:
        """Run a command in one process, without Slurm."""
        assert self.ended(self.start(command)) == 0, (self.cwd / "printed").read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.slurm("scancel", f"--name={self.name}")


def of_a_launcher(name: str) -> bool:
    return name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PYTEST_")) or name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def ends(folder: Path) -> bool:
    return (folder / "run.json").exists() and read_json(folder / "run.json")["status"] in ("done", "failed")


def same_curve(ours: Path, theirs: Path) -> None:
    """Assert one row per epoch and equal losses up to rounding (measured: relative error up to 0.00006)."""
    curves = [
        pd.read_csv(folder / "metrics.csv")[["epoch", "step", "images_seen", "lr", "loss"]]
        for folder in (ours, theirs)
    ]
    pd.testing.assert_frame_equal(*curves, rtol=1e-3)


def test_sweep_with_failed_and_preempted_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """Five jobs are done and one fails. The same command with resume=auto reruns only the failed job."""
    settings = f"{TINY} epochs=250 optimizer=sgd optimizer.warmup_epochs=0 optimizer.lr="
    command = f"{settings}0.0001,0.0002,0.0003,1e30,0.0004,0.0005 hydra.sweep.dir=swept"
    process = cluster.sweep(command)
    folders = [tmp_path / "swept" / str(number) for number in range(6)]
    preempted, failed = folders[1:3], folders[3]
    cluster.signal("USR2", preempted)
    assert cluster.ended(process) == 1
    records = [read_json(folder / "run.json") for folder in folders]
    assert [record["status"] for record in records] == ["done", "done", "done", "failed", "done", "done"]
    assert [record["starts"] for record in records] == [1, 2, 2, 1, 1, 1]
    assert "not finite" in records[3]["error"]
    assert "the loss is not finite at step" in (tmp_path / "printed").read_text()

    cluster.alone(f"-m {settings}0.0002,0.0003 hydra.sweep.dir=whole")
    for number, folder in enumerate(preempted):
        for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
            assert table(folder / name) == table(tmp_path / "whole" / str(number) / name)

    assert cluster.ended(cluster.sweep(f"{command} resume=auto")) == 1
    assert read_json(failed / "run.json")["starts"] == 2
    assert [read_json(folder / "run.json") for folder in folders if folder != failed] == records[
        :3
    ] + records[4:]
    assert len(list(tmp_path.glob("swept/*/run.json"))) == 6


def test_preempted_batch_job_with_two_processes_matches_one_process(cluster: Cluster, tmp_path: Path) -> None:
    command = f"{SLOW} hydra.run.dir="
    flags = (
        f"--job-name={cluster.name} --nodes=1 --ntasks-per-node=2"
        " --gpus-per-node=0 --cpus-per-task=1 --time=10"
    )
    job = cluster.slurm("sbatch", "--parsable", *flags.split(), str(SCRIPT), *f"{command}two".split()).strip()
    folder = tmp_path / "two"
    cluster.signal("USR1", [folder], rows=3)
    cluster.alone(f"{command}one")
    cluster.until(lambda: ends(folder) and not cluster.alive())
    log = (tmp_path / f"slurm-{job}.out").read_text()
    record = read_json(folder / "run.json")
    assert (record["status"], record["processes"], record["starts"], record["slurm_job"]) == (
        "done",
        2,
        2,
        job,
    ), log
    assert "the same command with resume=auto" in log
    same_curve(folder, tmp_path / "one")


def test_sweep_job_with_two_processes_matches_one_process(cluster: Cluster, tmp_path: Path) -> None:
    command = f"{SLOW} epochs=6 seed=3 hydra.sweep.dir="
    assert cluster.ended(cluster.sweep(f"{command}two hydra.launcher.tasks_per_node=2")) == 0
    cluster.alone(f"-m {command}one")
    record = read_json(tmp_path / "two" / "0" / "run.json")
    assert (record["status"], record["processes"], record["starts"]) == ("done", 2, 1)
    same_curve(tmp_path / "two" / "0", tmp_path / "one" / "0")


def test_job_at_time_limit_is_requeued_and_finishes(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm sends the signal after about 15 s; 400 epochs of three steps take at least 24 s."""
    (tmp_path / "slowly.py").write_text(
        "import time\n"
        "from ssl_runner.backbone import convnet\n"
        "def body(channels, image_size):\n"
        "    network = convnet(channels, image_size, [8, 16])\n"
        "    network.register_forward_pre_hook(lambda module, args: time.sleep(0.02 * module.training))\n"
        "    return network\n"
    )
    (tmp_path / "conf" / "backbone").mkdir(parents=True)
    (tmp_path / "conf" / "backbone" / "slowly.yaml").write_text("_target_: slowly.body\n")
    cluster.env["PYTHONPATH"] = str(tmp_path)
    tiny = TINY.replace("backbone.widths=[8,16]", "")
    command = f"backbone=slowly {tiny} epochs=400 diagnostics.every=100 hydra.sweep.dir=long"
    assert (
        cluster.ended(
            cluster.sweep(
                f"{command} hydra.launcher.timeout_min=1 hydra.launcher.signal_delay_s=50 --config-dir conf"
            )
        )
        == 0
    )
    record = read_json(tmp_path / "long" / "0" / "run.json")
    assert record["status"] == "done"
    assert record["starts"] >= 2
    assert [row["epoch"] for row in table(tmp_path / "long" / "0" / "metrics.csv")] == [
        str(n) for n in range(1, 401)
    ]
