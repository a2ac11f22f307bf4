"""The background thread of a run, copies of states in host memory, and checkpoints written from them."""

import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssl_runner.background import MAX_WAITING, Background
from ssl_runner.host_copy import HostCopy
from ssl_runner.runs import checkpoint
from tests.device import OnDevice, Waits, pretended


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
