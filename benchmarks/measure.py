"""How everything here is timed: contenders take turns in one process, and what is told of each is a median over the rounds."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssl_runner.device import release_freed_memory

MIB = 2**20
Work = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """The host waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def seconds(work: Work, device: torch.device) -> float:
    """How long one call takes, its device's part included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    contenders: dict[str, Work], device: torch.device, budget: float = 10.0, least: int = 3
) -> dict[str, float]:
    """The median seconds of a call of each contender. One call each warms up; then rounds, in which each takes its turn, for
    `budget` seconds and for at least so many rounds: whatever slows the machine slows all alike."""
    for work in contenders.values():
        seconds(work, device)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(taken[next(iter(taken))]) < least:
        for name, work in contenders.items():
            taken[name].append(seconds(work, device))
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_memory(work: Work, device: torch.device) -> float | None:
    """The most MiB that one call needs beside what was held before: of the device's memory on CUDA, else of this process's
    resident memory (Linux only; None elsewhere). Call it before anything of that size has run: what an allocator keeps for
    later is given back first, as far as it lets go of it."""
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
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def versus(times: dict[str, float], ours: str = "ours") -> dict[str, float]:
    """Every contender's time as a multiple of ours: 3 means that ours is three times as fast."""
    return {name: taken / times[ours] for name, taken in times.items()}


def describe(device: torch.device) -> str:
    """The machine in one line, for the figures' sake."""
    model = "CPU"
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"
