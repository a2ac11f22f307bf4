"""Sections of gpu-check that run whole programs: environment, tests, the default job, resume, NCCL."""

import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import ssl_runner
from benchmarks import measure
from benchmarks.gpu_job import Job
from benchmarks.gpu_rows import Section
from ssl_runner import api, distributed
from ssl_runner.distributed.collectives import ALL_GATHER, REDUCE_SCATTER
from ssl_runner.preemption import Preempted
from ssl_runner.train import Pretraining

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torchvision", "timm", "hydra-core", "numba", "numpy", "scikit-learn")
SHORT = ("probe.probes=[knn]", "probe.features=[backbone]", "diagnostics.every=0", "embedding.method=none")
SMALL = (
    "backbone.widths=[8,16]",
    "projector.width=16",
    "projector.K=8",
    "dataset.subset=200",
    "batch_size=20",
)
CUT = 3  # step after which a run of `resume` is preempted


def environment(section: Section) -> None:
    """What the figures depend on."""
    section.row("CPU", note=f"{measure.cpu_model()}, {os.cpu_count()} logical cores")
    if section.device.type == "cuda":
        found = torch.cuda.get_device_properties(section.device)
        memory, count = found.total_memory / 2**30, torch.cuda.device_count()
        section.row(
            "GPU",
            note=f"{found.name}, {memory:.0f} GiB, compute capability {found.major}.{found.minor},"
            f" {found.multi_processor_count} multiprocessors; {count} GPUs visible",
        )
        section.row("driver", note=driver())
        cuda, nccl = torch.version.cuda, ".".join(map(str, torch.cuda.nccl.version()))
        section.row("CUDA", note=f"{cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    own = f"ssl_runner {ssl_runner.__version__}, Python {platform.python_version()}"
    section.row("software", note=f"{own}, torch {torch.__version__}, {versions}")


def driver() -> str:
    """Version of the NVIDIA driver, power limit and largest clock, as nvidia-smi gives them."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi not found"
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or "nvidia-smi failed").splitlines()[0]


def tests(section: Section) -> None:
    """The tests marked `gpu`. On a CPU, where they are skipped, those of one file."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    marked = marked[:1] if section.tiny else marked
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, marked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    section.row("pytest -m gpu", failed=done.returncode != 0, note=lines[-1].strip("= "))
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            section.row("test", failed=True, note=line[:200])


def job(section: Section) -> None:
    """`ssl-run` with its defaults, on the digits that are part of the package."""

    def work() -> dict[str, Any]:
        small = ["epochs=1", *SHORT, *SMALL] if section.tiny else []
        start = time.perf_counter()
        result = api.run(f"device={section.device}", *small, folder=section.folder / "job")
        seconds = time.perf_counter() - start
        last = result.metrics.iloc[-1]
        note = f"{seconds:.0f} s, loss {last.loss:.4g}, top-1 {result.result['top1']:.3f}"
        return {"images_per_s": float(last.images_per_s), "note": note}

    section.attempt("ssl-run", work)


def resume(section: Section) -> None:
    """Each run three times: whole, whole again, and preempted within an epoch and resumed.

    Weights must be equal with `deterministic=true`, and on a CPU. Otherwise the difference is stated.
    """
    cases = [("bf16", "true"), ("fp16", "true"), ("bf16", "false")]
    for precision, deterministic in [("fp32", "false")] if section.tiny else cases:
        options = [f"precision={precision}", f"deterministic={deterministic}", f"device={section.device}"]
        options += ["epochs=2", *SHORT, *(SMALL if section.tiny else ())]
        name = f"{precision}, deterministic={deterministic}"
        folder = section.folder / f"resume-{precision}-{deterministic}"
        exact = section.tiny or deterministic == "true"

        def compare(other: str, options: list[str] = options, folder: Path = folder) -> float:
            if other == "again":
                api.run(*options, folder=folder / "whole")
                api.run(*options, folder=folder / "again")
            else:
                preempted(options, folder / "resumed")
                api.run(resume=folder / "resumed")
            return largest_difference(folder / "whole", folder / other)

        for other in ("again", "resumed"):

            def work(other: str = other, exact: bool = exact) -> dict[str, Any]:
                found = compare(other)
                note = f"largest difference of a weight {found:.2g}" if found else "bit-identical"
                return {"note": note, "failed": exact and found > 0}

            section.attempt(f"{name}, {other}", work)


def preempted(options: list[str], folder: Path) -> None:
    """Run until SIGUSR1 stops the run in the middle of its first epoch, with a checkpoint."""
    taken, step = [0], Pretraining._step

    def counted(self: Pretraining, *arguments: Any) -> Any:
        values = step(self, *arguments)
        taken[0] += 1
        if taken[0] == CUT:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    with mock.patch.object(Pretraining, "_step", counted), suppress(Preempted):
        api.run(*options, folder=folder)
        raise RuntimeError(f"the run was not preempted after step {CUT}")


def largest_difference(one: Path, other: Path) -> float:
    """Largest absolute difference between the weights of two runs, those of the projector included."""
    found = 0.0
    for name in ("backbone.safetensors", "projector.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        found = max(found, *(float((a[key].double() - b[key].double()).abs().max()) for key in a))
    return found


def nccl(section: Section) -> None:
    """One process per GPU (on a CPU two, with gloo): collectives, then training steps in each process."""
    W = 2 if section.tiny else torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # with CUDA from a server of this section: counting the GPUs may have used CUDA in this process
    context: Any = multiprocessing.get_context("fork" if section.tiny else "forkserver")
    group = os.getpgid(0)
    ranks = [context.Process(target=one_rank, args=(section, rank, W, port, group)) for rank in range(W)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        section.row("processes", failed=True, note=f"exit codes {codes}; log.txt has their output")


def one_rank(section: Section, rank: int, W: int, port: int, group: int) -> None:
    """The main function of one process. Rank 0 adds the rows."""
    os.setpgid(0, group)  # so that the end of the section ends this process
    log = os.open(section.folder / "log.txt", os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(W)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cpu") if section.tiny else torch.device("cuda", rank)
    if not section.tiny:
        torch.cuda.set_device(device)
    if W > 1:
        distributed.start()
    else:  # ssl_runner has no group for one process
        dist.init_process_group("gloo" if section.tiny else "nccl")
    wrong = collectives(device, rank, W)
    if rank == 0:
        note = wrong or f"as expected, {'gloo' if section.tiny else 'NCCL'}"
        section.row(f"collectives, {W} processes", failed=bool(wrong), note=note)
    if W == 1:
        dist.destroy_process_group()
        return
    here = Section(section.name, torch.device(device.type), section.folder)  # `build` numbers the GPUs
    steps = Job(here, *([] if section.tiny else [f"batch_size={512 * W}"]))
    for _ in range(1 if section.tiny else 5):
        steps.step()
    seconds = statistics.median(measure.seconds(steps.step, device) for _ in range(2 if section.tiny else 20))
    if rank == 0:
        section.row(
            f"training steps, {W} processes", ms=1e3 * seconds, images_per_s=steps.batch_size / seconds
        )
    distributed.finish()


def collectives(device: torch.device, rank: int, W: int) -> str:
    """Compare the collectives, and the gradient of DistributedDataParallel, with what they must return.

    Returns the names of those that differ, "" if there are none.
    """
    x = torch.arange(4.0 * W, device=device) + rank
    total = W * torch.arange(4.0 * W) + sum(range(W))
    reduced, gathered, scattered = x.clone(), x.new_empty(W * len(x)), x.new_empty(4)
    dist.all_reduce(reduced)
    getattr(dist, ALL_GATHER)(gathered, x)
    getattr(dist, REDUCE_SCATTER)(scattered, x)
    torch.manual_seed(0)
    layer = torch.nn.Linear(4 * W, 1, bias=False).to(device)
    network = torch.nn.parallel.DistributedDataParallel(layer)
    network(x).sum().backward()
    found = {
        "all_reduce": (reduced, total),
        "all_gather": (gathered, torch.cat([torch.arange(4.0 * W) + other for other in range(W)])),
        "reduce_scatter": (scattered, total[4 * rank : 4 * rank + 4]),
        "gradient": (layer.weight.grad[0], total / W),  # type: ignore[index]
    }
    wrong = [name for name, (a, b) in found.items() if not torch.equal(a.cpu(), b)]
    return f"wrong: {', '.join(wrong)}" if wrong else ""
