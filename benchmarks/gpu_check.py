"""scripts/gpu-check [SECTION ...]: check and measure ssl_runner on a GPU, as one table in Markdown.

Needs no network and no data set. A section that fails, or runs out of time, stops no other. The time limit
is divided among the sections. A section that needs less than its part leaves the rest to those after it. In
two calls each section has more time:

  scripts/gpu-check environment tests job resume nccl data
  scripts/gpu-check environment losses views probes steps
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from benchmarks import gpu_rows, gpu_runs, gpu_timed
from benchmarks.gpu_rows import Section

Work = Callable[[Section], None]
SECTIONS: dict[str, tuple[str, Work, int]] = {  # name -> what it does, its function, its share of the time
    "environment": ("versions of torch, CUDA, cuDNN and the driver; GPU and CPU", gpu_runs.environment, 2),
    "tests": ("the tests that need a GPU", gpu_runs.tests, 6),
    "job": ("the default run of ssl-run", gpu_runs.job, 3),
    "resume": ("a run again, and preempted and resumed: difference of the weights", gpu_runs.resume, 5),
    "nccl": ("one process per GPU: collectives and training steps", gpu_runs.nccl, 3),
    "losses": ("forward and backward pass of the losses", gpu_timed.losses, 2),
    "views": ("random views, eager and compiled", gpu_timed.views, 6),
    "probes": ("linear, kNN and ridge probe on 50,000 features", gpu_timed.probes, 2),
    "data": ("training steps at 96 pixels, images on the device and on the host", gpu_timed.data, 3),
    "steps": ("training steps of ResNet-18 in all precisions: eager, compiled, graphs", gpu_timed.steps, 20),
}


def main() -> None:
    given = arguments()
    device, names = torch.device(given.device), given.sections or list(SECTIONS)
    given.out.mkdir(parents=True)
    os.environ["SSL_RUNNER_DATA"] = str((given.out / "data").resolve())  # of the runs: caches
    end = time.monotonic() + 60 * given.minutes
    # CUDA cannot be used in a process forked from one that has used it. The server imports torch once and
    # never uses CUDA, and each section is forked from it. With the variable, looking for a GPU is no use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_imports"])
    first = context.Process(target=int)  # starts the server, whose imports take no section's time
    first.start()
    first.join()
    for position, name in enumerate(names):
        _, work, share = SECTIONS[name]
        shares = sum(SECTIONS[later][2] for later in names[position:])
        limit = max(0.0, end - time.monotonic()) * share / shares
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        run(Section(name, device, given.out), work, limit, context)
    rows = gpu_rows.read(given.out)
    table = gpu_rows.markdown(rows)
    (given.out / "gpu-check.md").write_text(table + "\n")
    print(table, flush=True)
    if failed := sum(row["failed"] for row in rows):
        print(
            f"{failed} rows failed; {given.out / 'log.txt'} has the output of all sections", file=sys.stderr
        )
        sys.exit(1)


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    listed = "\n".join(f"  {name:13}{what}" for name, (what, _, _) in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description=f"{__doc__}\nsections (default: all, in this order):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="sections to run, see above")
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, or cpu: tiny sizes, to try the command"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="time limit of all sections (default: 9.5)"
    )
    out = Path("outputs/gpu-check") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument("--out", type=Path, default=out, help="output folder (default: a new one)")
    given = parser.parse_args()
    unknown = set(given.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"SECTION={' '.join(sorted(unknown))}: expected one or more of {', '.join(SECTIONS)}")
    if given.minutes <= 0:
        parser.error(f"--minutes={given.minutes:g}: expected a number above 0; give more time")
    if given.out.exists():
        parser.error(f"--out={given.out}: expected a folder that does not exist; choose another name")
    kind, _, index = given.device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind not in ("cuda", "cpu") or not (index or "0").isdecimal() or (kind == "cpu" and index):
        parser.error(f"--device={given.device}: expected cuda, cuda:<number> or cpu")
    if kind == "cuda" and int(index or 0) >= count:
        parser.error(
            f"--device={given.device}: this machine has {count} CUDA devices; use --device cpu to try the"
            " command on a CPU"
        )
    return given


def run(section: Section, work: Work, limit: float, context: BaseContext) -> None:
    """Run a section in a process of its own, for at most `limit` seconds. Its failure is a row."""
    if limit < 1:
        section.row("section", failed=True, note="not started: out of time")
        return
    start = time.monotonic()
    process = context.Process(target=begin, args=(section, work))  # type: ignore[attr-defined]
    process.start()
    try:
        process.join(limit)
        stopped = process.is_alive()
    finally:  # on Ctrl-C as well
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the section and the processes that it has started
        process.kill()  # it may not have made the group yet
        process.join()
    took = f"{time.monotonic() - start:.0f} s"
    if stopped:
        section.row(
            "section", failed=True, note=f"stopped after {took}: out of time; rows above are complete"
        )
    elif process.exitcode:
        log = [line for line in (section.folder / "log.txt").read_text().splitlines() if line.strip()]
        section.row(
            "section", failed=True, note=f"exit code {process.exitcode} after {took}: {log[-1][:200]}"
        )
    else:
        section.row("section", note=f"done in {took}")


def begin(section: Section, work: Work) -> None:
    """The main function of a section's process: a process group of its own, all output to the log."""
    os.setpgid(0, 0)
    with open(section.folder / "log.txt", "a") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    print(f"=== {section.name}", flush=True)
    work(section)


if __name__ == "__main__":
    main()
