"""Time from the shell to the first training step, compared with the import time of the peers.

Each measurement runs in its own process.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = "epochs=1 backbone.widths=[8,16] projector.width=16 projector.K=8 diagnostics.every=0 device=cpu"
FIRST_STEP = f"""
import sys
from ssl_runner import cli, train

def after_a_step(*args, step=train.Pretraining._step):
    step(*args)
    raise KeyboardInterrupt

train.Pretraining._step = after_a_step
sys.argv = ["ssl-run", *{TINY.split()}]
cli.main()
"""
CONTENDERS = {  # (work, tool) -> arguments of the interpreter
    ("print the configuration", "ssl_runner: ssl-run --cfg job"): ["-m", "ssl_runner", "--cfg", "job"],
    ("imports", "ssl_runner: pipeline"): ["-c", "import ssl_runner.pipeline"],
    ("imports", "torch alone"): ["-c", "import torch"],
    ("imports", "torch, torchvision, timm"): ["-c", "import torch, torchvision, timm"],
    ("imports", "lightly"): ["-c", "import lightly.loss, lightly.models, lightly.transforms"],
    ("imports", "lightning"): ["-c", "import lightning"],
    ("imports", "stable-pretraining"): [
        "-c",
        "import stable_pretraining; stable_pretraining.Manager, stable_pretraining.Module",
    ],
    ("to the first step", "ssl_runner: ssl-run"): ["-c", FIRST_STEP],
}


# Runs between this process and the measured one: a forked process inherits the peak memory of its parent.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
taken = time.perf_counter() - start
cpu_seconds = usage.ru_utime + usage.ru_stime
print(os.waitstatus_to_exitcode(status), taken, cpu_seconds, usage.ru_maxrss, file=sys.stderr)
"""


def process(arguments: list[str], folder: str) -> tuple[float, float, float]:
    """Run a process. Returns wall-clock time (s), CPU time (s) and peak memory (MiB).

    Raises RuntimeError if the process fails.
    """
    command = [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    *messages, figures = done.stderr.splitlines()
    code, seconds, computing, peak = map(float, figures.split())
    if code and not (messages and messages[-1].startswith("interrupted")):
        raise RuntimeError(
            f"{' '.join(arguments)[:80]} exited with code {code:.0f}: {' '.join(messages)[-500:]}"
        )
    return seconds, computing, peak / (1024 if sys.platform == "linux" else 2**20)


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per contender. Everything runs on the CPU; `device` and `data` are not used."""
    taken: dict[tuple[str, str], list[tuple[float, ...]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(8 if full else 3):
            for contender, arguments in CONTENDERS.items():
                measured = process(arguments, folder)
                if turn:  # the first turn fills the file cache and the bytecode cache
                    taken[contender].append(measured)
    seconds = {contender: statistics.median(turn[0] for turn in turns) for contender, turns in taken.items()}
    ours = {work: seconds[work, tool] for work, tool in seconds if tool.startswith("ssl_runner")}
    return [
        {
            "work": work,
            "tool": tool,
            "seconds": seconds[work, tool],
            "ratio": seconds[work, tool] / ours[work],
            "cpu_seconds": statistics.median(turn[1] for turn in turns),
            "peak_mib": max(turn[2] for turn in turns),
        }
        for (work, tool), turns in taken.items()
    ]
