"""Tests of scripts/gpu-check: its table, its time limits, its measurements, and the command on a CPU."""

import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch.autograd import DeviceType

from benchmarks import gpu_check, gpu_job, gpu_rows, gpu_runs, gpu_timed
from benchmarks.gpu_rows import Section

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")  # the command's forkserver would import torch again


@pytest.fixture
def section(tmp_path: Path) -> Section:
    return Section("part", CPU, tmp_path)


def test_table_omits_empty_columns_and_marks_failed_rows(section: Section) -> None:
    section.row("one", ms=1.2345, idle=0.052)
    section.row("two", failed=True, note="a | b\nc")
    assert gpu_rows.markdown(gpu_rows.read(section.folder)).splitlines() == [
        "| section | what | ms | idle | note |",
        "| --- | --- | --- | --- | --- |",
        "| part | one | 1.23 | 5% |  |",
        "| part | two |  |  | **failed**: a \\| b c |",
    ]


def test_attempt_turns_error_into_row(section: Section, capsys: pytest.CaptureFixture[str]) -> None:
    section.attempt("divide", lambda: {"ms": 1 / 0})
    section.attempt("next", lambda: {"ms": 1.0})
    assert [(row["what"], row["failed"], row.get("note")) for row in gpu_rows.read(section.folder)] == [
        ("divide", True, "ZeroDivisionError: division by zero"),
        ("next", False, None),
    ]
    assert "Traceback" in capsys.readouterr().err


def fails(section: Section) -> None:
    section.row("before")
    raise RuntimeError("no such kernel")


def hangs(section: Section) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
    section.row("before", note=str(child.pid))
    child.wait()


def test_failed_section_has_its_rows_and_its_error(section: Section) -> None:
    gpu_check.run(section, fails, 60, FORK)
    before, after = gpu_rows.read(section.folder)
    assert before["what"] == "before"
    assert after["failed"]
    assert after["note"].endswith("RuntimeError: no such kernel")
    assert "Traceback" in (section.folder / "log.txt").read_text()


def test_section_out_of_time_is_stopped_with_its_processes(section: Section) -> None:
    start = time.monotonic()
    gpu_check.run(section, hangs, 1.5, FORK)
    assert time.monotonic() - start < 30
    before, after = gpu_rows.read(section.folder)
    assert after["failed"]
    assert "out of time" in after["note"]
    with suppress(psutil.NoSuchProcess):  # killed; not every container has a process that reaps it
        assert psutil.Process(int(before["note"])).status() == psutil.STATUS_ZOMBIE


def test_section_without_time_is_not_started(section: Section) -> None:
    gpu_check.run(section, fails, 0.0, FORK)
    [row] = gpu_rows.read(section.folder)
    assert (row["failed"], row["note"]) == (True, "not started: out of time")


def event(start: float, end: float, device: DeviceType = DeviceType.CUDA, named: bool = False) -> object:
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(time_range=time_range, device_type=device, is_user_annotation=named, name="")


def test_busy_time_counts_overlapping_kernels_once() -> None:
    events = [
        event(0, 10_000),
        event(2_000, 4_000),  # on another stream, within the first
        event(9_000, 12_000),
        event(20_000, 21_000),
        event(0, 50_000, named=True),  # a range named by the host
        event(0, 70_000, device=DeviceType.CPU),
    ]
    assert gpu_timed.kernels_and_time(events) == (4, 13.0)


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_timed_measures_idle_share_against_time_without_profiler(tmp_path: Path) -> None:
    """The branch for CUDA, with torch's functions for the device replaced."""
    section = Section("part", torch.device("cuda", 0), tmp_path)
    stand_ins = {
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_reserved": lambda device: 3 * 2**30,
    }
    calls: list[int] = []
    with (
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(gpu_timed, "kernels_and_time", return_value=(200, gpu_timed.PROFILED * 15.0)),
    ):
        found = gpu_timed.timed(section, lambda: (calls.append(1), time.sleep(0.02)), "name")
    assert len(calls) == gpu_timed.WARMUP + gpu_timed.BLOCKS * gpu_timed.CALLS + gpu_timed.PROFILED
    assert (found["gib"], found["kernels"]) == (3.0, 200 / gpu_timed.PROFILED)
    assert found["idle"] == pytest.approx(1 - 15 / found["ms"])
    assert (tmp_path / "profile-name.txt").exists()


@pytest.mark.slow
def test_sections_for_a_gpu_cover_precisions_modes_and_sizes(section: Section) -> None:
    """The rows of a GPU, with stand-ins for the work."""
    given: list[tuple[tuple[str, ...], dict[str, object]]] = []

    def job(section: Section, *overrides: str, **options: object) -> None:
        given.append((overrides, options))

    with (
        mock.patch.object(Section, "tiny", False),
        mock.patch.object(gpu_timed, "Job", job),
        mock.patch.object(gpu_timed, "of_steps", return_value={}),
        mock.patch.object(gpu_timed, "of_views", return_value={}),
        mock.patch.object(gpu_timed, "timed", return_value={}),
    ):
        for work in (gpu_timed.steps, gpu_timed.data, gpu_timed.views, gpu_timed.losses):
            work(section)
    rows = gpu_rows.read(section.folder)
    assert not any(row["failed"] for row in rows)
    assert len({row["what"] for row in rows}) == len(rows) == 12 + 2 + 10 + 12
    assert given[:3] == [(("precision=bf16",), {"compile": mode}) for mode in ("false", "true", "graphs")]
    assert {(*overrides, options["compile"]) for overrides, options in given[:12]} == {
        (f"precision={precision}", mode)
        for precision in ("bf16", "fp32", "tf32", "fp16")
        for mode in ("false", "true", "graphs")
    }
    assert given[12:] == [((f"dataset.storage={place}",), {"side": 96}) for place in ("device", "host")]


def test_job_for_a_gpu_is_resnet18_at_batch_512(tmp_path: Path) -> None:
    cfg = gpu_job.settings(Section("part", torch.device("cuda", 1), tmp_path), "+dataset.side=32")
    assert (cfg.backbone.name, cfg.batch_size, cfg.V, cfg.device) == ("resnet18", 512, 2, "cuda:1")
    assert cfg.dataset._target_ == "benchmarks.made.images"
    assert cfg.dataset.n_train >= 4 * cfg.batch_size


def test_largest_difference_includes_projector(tmp_path: Path) -> None:
    for name, value in (("one", 0.0), ("other", 0.5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(3)}, tmp_path / name / "backbone.safetensors")
        save_file({"w": torch.tensor([1.0, value])}, tmp_path / name / "projector.safetensors")
    assert gpu_runs.largest_difference(tmp_path / "one", tmp_path / "one") == 0
    assert gpu_runs.largest_difference(tmp_path / "one", tmp_path / "other") == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("job stepps", "SECTION=stepps: expected one or more of environment, tests"),
        ("--minutes 0", "--minutes=0: expected a number above 0"),
        ("--out .", "--out=.: expected a folder that does not exist"),
        ("--device tpu", "--device=tpu: expected cuda, cuda:<number> or cpu"),
        ("--device cuda:99", "--device=cuda:99: this machine has"),
    ],
)
def test_command_rejects_invalid_arguments(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu-check", *arguments.split()])
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command_runs_all_sections_on_cpu(tmp_path: Path) -> None:
    """A new folder holds the table that is printed, and all sections end without a failed row."""
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == (tmp_path / "out" / "gpu-check.md").read_text()
    rows = gpu_rows.read(tmp_path / "out")
    assert [row["section"] for row in rows if row["what"] == "section"] == list(gpu_check.SECTIONS)
    for name in ("losses", "views", "data", "steps"):
        assert all(row["ms"] > 0 for row in rows if row["section"] == name and row["what"] != "section")
