"""Profile of the first steps of the training, for `profile=true`."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.evaluator import Columns
from ssl_runner.runs.files import atomic_write

ROWS = 40  # operators in the table
STEPS = 20  # the profiler keeps their events in memory


def profiled(
    epochs: Iterable[Columns], loader: MultiViewLoader, folder: Path, device: torch.device
) -> Iterator[Columns]:
    """Yield the rows of `epochs`, and profile the first STEPS batches of the loader in them.

    After these, or at the end, writes trace.json, for chrome://tracing or Perfetto, and profile.txt, the
    operators with the most time of their own on the device.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]

    def action(step: int) -> ProfilerAction:
        last = ProfilerAction.RECORD_AND_SAVE if step == STEPS - 1 else ProfilerAction.NONE
        return ProfilerAction.RECORD if step < STEPS - 1 else last

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        with atomic_write(folder / "profile.txt") as file:
            table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=ROWS)
            file.write(table.encode())
        print(f"profile: {folder}/profile.txt, and trace.json for Perfetto or chrome://tracing", flush=True)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # which writes to stderr that there is no GPU
    with profile(activities=activities, schedule=action, on_trace_ready=write) as profiler:
        loader.after_batch = profiler.step
        yield from epochs
