"""Time and memory measurement: contenders take turns in one process; times are medians over rounds."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssl_runner.device import release_freed_memory, synchronize

MIB = 2**20
Work = Callable[[], Any]


def seconds(work: Work, device: torch.device) -> float:
    """Wall-clock time of one call (s), including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    contenders: dict[str, Work], device: torch.device, budget: float = 10.0, least: int = 3
) -> dict[str, float]:
    """Median time per call (s) of each contender.

    After one warm-up call each, all contenders are called once per round, for at least `budget` seconds and
    `least` rounds. Taking turns exposes all contenders to the same disturbances.
    """
    for work in contenders.values():
        seconds(work, device)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(taken[next(iter(taken))]) < least:
        for name, work in contenders.items():
            taken[name].append(seconds(work, device))
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_memory(work: Work, device: torch.device) -> float | None:
    """Peak memory of one call in MiB, in addition to the memory in use before it.

    On CUDA this is device memory, otherwise the resident memory of this process (Linux only; None elsewhere).
    Cached memory is returned to the system first, as far as the allocator permits. Call this function before
    any other work of that size.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / MIB
    if sys.platform != "linux":
        return None
    release_freed_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the high-water mark
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Read a field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def versus(times: dict[str, float], ours: str = "ours") -> dict[str, float]:
    """Divide all times by ours: 3 means that ours is three times as fast."""
    return {name: taken / times[ours] for name, taken in times.items()}


def describe(device: torch.device) -> str:
    """Describe the machine in one line: processor or GPU, threads, torch version."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cpu_model() -> str:
    """Name of the processor (Linux only; "CPU" elsewhere)."""
    if sys.platform != "linux":
        return "CPU"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")
