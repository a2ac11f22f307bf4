"""Profile of the training, for `debug=profile`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from ssl_runner.evaluator import Columns
from ssl_runner.runs.files import atomic_write

ROWS = 40  # operators in the table


def profiled(epochs: Iterable[Columns], folder: Path, device: torch.device) -> Iterator[Columns]:
    """Yield the rows of `epochs`, and profile their computation.

    Writes trace.json, for chrome://tracing or Perfetto, and profile.txt, the operators with the most time of
    their own on the device.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        yield from epochs
    profiler.export_chrome_trace(str(folder / "trace.json"))
    with atomic_write(folder / "profile.txt") as file:
        table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=ROWS)
        file.write(table.encode())
