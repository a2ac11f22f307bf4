"""The background thread of a run, copies of states in host memory, and the checkpoints written from them."""

import json
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssl_runner.background import MAX_WAITING, Background
from ssl_runner.evaluator import Columns, Evaluator
from ssl_runner.host_copy import HostCopy
from ssl_runner.model import SSLModel
from ssl_runner.runs import checkpoint
from tests.device import OnDevice, Waits, pretended
from tests.helpers import TINY, run_folder, table


def test_jobs_run_in_order_in_one_other_thread() -> None:
    done: list[tuple[int, int]] = []

    def job(number: int) -> None:
        time.sleep(0.002 * (number % 3))
        done.append((number, threading.get_ident()))

    with Background() as background:
        for number in range(3 * MAX_WAITING):
            background.submit(lambda number=number: job(number))
    assert [number for number, _ in done] == list(range(3 * MAX_WAITING))
    assert len({thread for _, thread in done} | {threading.get_ident()}) == 2


@pytest.mark.parametrize("forgotten", [False, True])
def test_failed_job_stops_later_jobs_and_surfaces(forgotten: bool) -> None:
    """Also if the failed job is no longer among those that `submit` checks."""
    done: list[int] = []

    def fail() -> None:
        raise OSError("disk full")

    def run() -> None:
        with Background() as background:
            background.submit(fail)
            if forgotten:
                background.jobs.clear()
            for _ in range(1 if forgotten else MAX_WAITING):
                background.submit(lambda: done.append(1))

    with pytest.raises(OSError, match="disk full"):
        run()
    assert done == []


def test_exit_waits_for_jobs_after_an_exception() -> None:
    done = []

    def run() -> None:
        with Background() as background:
            background.submit(lambda: (time.sleep(0.05), done.append(1)))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert done == [1]


def state_of_training() -> dict[str, Any]:
    """The state of a channels-last network and its optimiser after one step."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    return {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": [(torch.get_rng_state(), None)],
        "epoch": 3,
    }


def flat(state: Any) -> list[Any]:
    """The leaves of a state: tensors and other values."""
    if isinstance(state, dict):
        state = [x for item in state.items() for x in item]
    return [x for part in state for x in flat(part)] if isinstance(state, list | tuple) else [state]


def test_host_copy_equals_state_and_is_independent_of_it(tmp_path: Path) -> None:
    state = state_of_training()
    copied, _ = HostCopy()(state)
    assert isinstance(copied["network"], OrderedDict)
    assert copied["network"]._metadata == state["network"]._metadata
    assert copied["network"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    checkpoint.save(state, tmp_path)
    expected = checkpoint.load(tmp_path / "checkpoint.pt")
    for value in flat(state):
        if isinstance(value, torch.Tensor):
            value.zero_()
    state["optimizer"]["state"][0]["step"] = 7
    for ours, theirs in zip(flat(copied), flat(expected), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_host_copy_reuses_buffers_and_follows_changed_shapes() -> None:
    copy = HostCopy()
    first, _ = copy({"a": torch.ones(3), "b": torch.ones(2, 2)})
    places = [value.data_ptr() for value in first.values()]
    second, _ = copy({"a": torch.zeros(3), "b": torch.zeros(2, 2)})
    assert [value.data_ptr() for value in second.values()] == places
    third, _ = copy({"a": torch.arange(4), "b": torch.zeros(2, 2), "c": torch.zeros(1)})
    assert torch.equal(third["a"], torch.arange(4))
    assert third["b"].data_ptr() == places[1]


def test_host_copy_from_device_does_not_sync_before_wait() -> None:
    with pretended():
        copied, wait = HostCopy()({"x": OnDevice(torch.arange(3.0)), "y": torch.ones(2)})
        assert not isinstance(copied["x"], OnDevice)
        assert copied["x"].tolist() == [0, 1, 2]
        with pytest.raises(Waits, match="synchronize"):
            wait()


# --- checkpoints ------------------------------------------------------------------------------------------


class Slow:
    """Stand-in for `checkpoint.save` that blocks until `go` is set, and records the epochs that it saved."""

    def __init__(self) -> None:
        self.go, self.saved = threading.Event(), []

    def __call__(self, state: dict[str, Any], folder: Path) -> None:
        assert self.go.wait(10)
        assert torch.equal(state["weights"], torch.full((3,), float(state["epoch"])))
        self.saved.append(state["epoch"])


def epoch(number: int) -> dict[str, Any]:
    return {"epoch": number, "weights": torch.full((3,), float(number))}


def test_writer_returns_before_checkpoint_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state may change meanwhile. A second checkpoint waits for the first."""
    slow = Slow()
    monkeypatch.setattr(checkpoint, "save", slow)
    with Background() as background, checkpoint.Writer(tmp_path, background) as writer:
        first = epoch(1)
        writer.write(first)
        first["weights"].zero_()
        assert slow.saved == []
        threading.Timer(0.05, slow.go.set).start()
        writer.write(epoch(2))
        assert slow.saved[0] == 1
    assert slow.saved == [1, 2]


@pytest.mark.parametrize(("later", "expected"), [([], 2), ([3], 3)])
def test_held_state_is_written_only_if_the_run_ends_before_the_next_checkpoint(
    later: list[int], expected: int, tmp_path: Path
) -> None:
    def run() -> None:
        with Background() as background, checkpoint.Writer(tmp_path, background) as writer:
            writer.write(epoch(1))
            background.wait()
            writer.hold(epoch(2))
            for number in later:
                writer.write(epoch(number))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert checkpoint.load(checkpoint.find(tmp_path))["epoch"] == expected


def test_hold_keeps_buffers_of_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(checkpoint, "save", slow)
    with Background() as background, checkpoint.Writer(tmp_path, background) as writer:
        writer.write(epoch(1))
        writer.hold(epoch(2))
        slow.go.set()
    assert slow.saved == [1]


def test_failed_checkpoint_raises_in_the_training_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(state: object, file: object) -> None:
        raise OSError("disk full")

    def run() -> None:
        with Background() as background, checkpoint.Writer(tmp_path, background) as writer:
            writer.write(epoch(1))
            with pytest.raises(OSError, match="disk full"):
                writer.write(epoch(2))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):  # on exit as well
        run()
    assert checkpoint.find(tmp_path) is None


# --- runs -------------------------------------------------------------------------------------------------

RUN = f"{TINY} epochs=4 +evaluators.norm._target_=tests.helpers.NormInBackground"


def test_row_is_written_before_a_checkpoint_of_a_later_epoch(
    ssl_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written after every step. The columns of a row take longer than a step."""
    save, epochs = checkpoint.save, []

    def checked_save(state: dict[str, Any], folder: Path) -> None:
        if state["epoch"]:
            assert [int(row["epoch"]) for row in table(folder / "metrics.csv")][-1] >= state["epoch"]
        epochs.append(state["epoch"])
        save(state, folder)

    monkeypatch.setattr("ssl_runner.train.SAVE_INTERVAL", -1.0)
    monkeypatch.setattr(checkpoint, "save", checked_save)
    code, out, err = ssl_run(f"{RUN} +evaluators.norm.seconds=0.05")
    assert (code, err) == (0, "")
    assert set(epochs) == {0, 1, 2, 3}
    rows = table(run_folder(out) / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["norm"]) > 0 for row in rows)


class InterruptsOnce(Evaluator):
    """Preempt the run in `evaluate` of epoch 3, the first time."""

    def __init__(self, loader: Any, relation: Any, loss: Any, folder: Path):
        super().__init__()
        self.done = folder / "interrupted"

    def evaluate(self, model: SSLModel, epoch: int) -> Columns:
        if epoch == 3 and not self.done.exists():
            self.done.touch()
            signal.raise_signal(signal.SIGTERM)
        return {}


def test_run_preempted_in_an_evaluator_keeps_the_epoch(ssl_run, tmp_path: Path) -> None:
    """The run is shorter than a minute, so the checkpoint is the state held at the end of the epoch."""
    whole = run_folder(ssl_run(f"{RUN} hydra.run.dir=whole")[1])
    command = f"{RUN} +evaluators.stop._target_=tests.test_background.InterruptsOnce hydra.run.dir=mine"
    assert ssl_run(command)[0] == 75
    mine = tmp_path / "mine"
    state = checkpoint.load(mine / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == (2, 9)
    assert len(table(mine / "metrics.csv")) == 2
    assert ssl_run("resume=mine")[0] == 0
    for name in ("metrics.csv", "probe.csv", "spectrum.csv"):
        assert table(mine / name) == table(whole / name)
    assert (mine / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()


class FailsInBackground(Evaluator):
    columns = ("wrong",)

    def __init__(self, loader: Any, relation: Any, loss: Any, folder: Path):
        super().__init__()

    def evaluate(self, model: SSLModel, epoch: int) -> Callable[[], Columns]:
        def columns() -> Columns:
            if epoch == 2:
                raise ValueError("no number in epoch 2")
            return {"wrong": epoch}

        return columns


def test_error_in_the_background_ends_the_run(ssl_run, tmp_path: Path) -> None:
    command = f"{TINY} epochs=30 +evaluators.wrong._target_=tests.test_background.FailsInBackground"
    code, _, err = ssl_run(f"{command} hydra.run.dir=mine")
    assert code == 1
    assert "no number in epoch 2" in err
    record = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "ValueError: no number in epoch 2")
    assert [row["epoch"] for row in table(tmp_path / "mine" / "metrics.csv")] == ["1"]
