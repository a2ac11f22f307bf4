"""From the shell to the first step of training, each in a process of its own: ours, and what the peers' imports alone take."""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
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
CONTENDERS = {  # (work, tool): what the interpreter is given
    ("the command's own part", "ours: ssl-run --cfg job"): ["-m", "ssl_runner", "--cfg", "job"],
    ("imports", "ours: ssl_runner.run"): ["-c", "import ssl_runner.run"],
    ("imports", "torch alone"): ["-c", "import torch"],
    ("imports", "torch, torchvision, timm"): ["-c", "import torch, torchvision, timm"],
    ("imports", "lightly"): ["-c", "import lightly.loss, lightly.models, lightly.transforms"],
    ("imports", "lightning"): ["-c", "import lightning"],
    ("imports", "stable-pretraining"): ["-c", "import stable_pretraining"],
    ("to the first step", "ours: ssl-run"): ["-c", FIRST_STEP],
}


def process(arguments: list[str], folder: str) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of computing and the most MiB of memory of a process. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode and not re.match("interrupted", said.splitlines()[-1] if said else ""):
        raise RuntimeError(f"{' '.join(arguments)[:80]} ended with {child.returncode}: {said[-500:]}")
    peak = usage.ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """On the host alone; `device` and `data` play no part."""
    taken: dict[tuple[str, str], list[tuple[float, ...]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(8 if full else 3):
            for contender, arguments in CONTENDERS.items():
                measured = process(arguments, folder)
                if turn:  # the first one fills the caches of files and of byte code
                    taken[contender].append(measured)
    seconds = {contender: statistics.median(turn[0] for turn in turns) for contender, turns in taken.items()}
    ours = {work: seconds[work, tool] for work, tool in seconds if tool.startswith("ours")}
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
