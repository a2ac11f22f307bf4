"""Sections of gpu-check that time parts of a run: steps, data, losses, views, probes.

On CUDA every row also has the peak of the device memory that PyTorch holds, and from a profile the number of
kernels (copies included) and the share of the time in which the device is idle.
"""

import gc
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.gpu_job import BATCH, Job
from benchmarks.gpu_rows import Section
from ssl_runner import numerics
from ssl_runner.config.compose import CONF
from ssl_runner.device import synchronize
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.probe import KnnProbe, LinearProbe, RidgeProbe
from ssl_runner.probe.protocol import accuracies, best_of
from ssl_runner.relation import Views
from ssl_runner.views import Augment, ViewFormat

WARMUP, BLOCKS, CALLS = 6, 3, 10  # calls before the clock starts, timed blocks of calls, calls of a block
PROFILED = 5  # calls
EPOCH = 50_000  # images of an epoch of CIFAR-10
LOSSES: dict[str, type[Loss]] = {"VICReg": VICReg, "Barlow Twins": BarlowTwins, "SimCLR": SimCLR}


def steps(section: Section) -> None:
    """One row per precision and mode of compilation, those of bf16 first."""
    modes = {"eager": "false", "compiled": "true", "graphs": "graphs"}
    cases = [("bf16", mode) for mode in modes]
    cases += [(precision, "eager") for precision in ("fp32", "tf32", "fp16")]
    cases += [(precision, mode) for precision in ("fp32", "tf32", "fp16") for mode in ("compiled", "graphs")]
    for precision, mode in [("fp32", "eager"), ("bf16", "eager")] if section.tiny else cases:

        def work(precision: str = precision, mode: str = mode) -> dict[str, Any]:
            job = Job(section, f"precision={precision}", compile=modes[mode])
            return of_steps(section, job, f"{precision}-{mode}")

        section.attempt(f"{precision}, {mode}", work)
        release(section.device)


def data(section: Section) -> None:
    """One row per place of the images: on the device, and on the host, from which a thread copies them."""
    for storage in ("device", "host"):

        def work(storage: str = storage) -> dict[str, Any]:
            job = Job(section, f"dataset.storage={storage}", side=8 if section.tiny else 96)
            return of_steps(section, job, f"storage-{storage}")

        section.attempt(f"images on the {storage}", work)
        release(section.device)


def of_steps(section: Section, job: Job, name: str) -> dict[str, Any]:
    """Figures of training steps. `note` has the first step, and the share of the views in a step's time."""
    first = measure.seconds(job.step, section.device)
    figures = timed(section, job.step, name)
    views = timed(section, job.views, None)["ms"] / figures["ms"]
    rate = 1e3 * job.batch_size / figures["ms"]
    note = f"views {views:.1%} of a step, first step {first:.1f} s, compile {job.mode}"
    return {**figures, "images_per_s": rate, "epoch_s": EPOCH / rate, "note": note}


def losses(section: Section) -> None:
    """One row per loss and size: n images, V views of each, K columns of Z. In float32."""
    numerics.apply(section.device, "fp32", deterministic=False)
    sizes = [(512, 256, 2), (512, 2048, 2), (2048, 512, 8), (512, 8192, 2)]
    for (name, of), (n, K, V) in product(LOSSES.items(), [(16, 8, 2)] if section.tiny else sizes):

        def work(of: type[Loss] = of, n: int = n, K: int = K, V: int = V) -> dict[str, Any]:
            Z = torch.randn(V * n, K, device=section.device, requires_grad=True)
            loss, G = of(), Views(n, V, device=section.device)
            return timed(section, lambda: loss(Z, G).backward(), None)

        section.attempt(f"{name}, n={n} K={K} V={V}", work)


def views(section: Section) -> None:
    """One row per policy, size and mode: two views of each image of a batch, bf16 and channels-last."""
    numerics.apply(section.device, "bf16", deterministic=False)
    cases = [("simclr", 32), ("vicreg", 32), ("barlow", 32), ("digits", 28), ("vicreg", 96), ("vicreg", 224)]
    compiled = [case for case in cases if case[0] in ("simclr", "vicreg")]
    modes = [(case, "eager") for case in cases] + [(case, "compiled") for case in compiled]
    for (policy, side), mode in [(("simclr", 8), "eager")] if section.tiny else modes:
        section.attempt(f"{policy}, {side} px, {mode}", partial(of_views, section, policy, side, mode))
        release(section.device)


def of_views(section: Section, policy: str, side: int, mode: str) -> dict[str, Any]:
    """Figures of the views of one batch."""
    device, n = section.device, 16 if section.tiny else BATCH
    augment: Augment = instantiate(OmegaConf.load(CONF / "views" / f"{policy}.yaml"), _convert_="all")
    if mode == "compiled":
        torch.compiler.reset()
        augment.compile()
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=device)
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    generator = torch.Generator(device).manual_seed(0)
    written = ViewFormat(None, torch.bfloat16, torch.channels_last)
    work = partial(augment, images, 2, mean, std, generator, view_format=written)
    first = measure.seconds(work, device)
    figures = timed(section, work, f"views-{policy}-{side}-{mode}")
    return {**figures, "images_per_s": 1e3 * n / figures["ms"], "note": f"first call {first:.1f} s"}


def probes(section: Section) -> None:
    """One row per probe: fitted on nine tenths of the features of 10 classes, selected on the rest."""
    numerics.apply(section.device, "fp32", deterministic=False)
    n, d = (500, 16) if section.tiny else (50_000, 512)
    y, m = torch.arange(n, device=section.device) % 10, n // 10
    means = torch.randn(10, d, device=section.device)
    X = (torch.randn(n, d, device=section.device) + means[y] / 8).relu()
    for Probe in (LinearProbe, KnnProbe, RidgeProbe):

        def work(Probe: Any = Probe) -> dict[str, Any]:
            def fit() -> float:
                _, scores = best_of(Probe(X[m:], y[m:], 10).path(X[:m]), y[:m])
                return accuracies(scores, y[:m])["top1"] or 0.0

            top1 = fit()
            seconds = statistics.median(measure.seconds(fit, section.device) for _ in range(3))
            return {"ms": 1e3 * seconds, "note": f"top-1 {top1:.3f} on {m:,} rows"}

        section.attempt(f"{Probe.__name__}, {n - m:,} x {d}", work)


# --- measurement ---


def timed(section: Section, work: Callable[[], Any], name: str | None) -> dict[str, Any]:
    """Median time of a call (ms) and, on CUDA, memory, kernels and idle share.

    With a `name`, the table of the profile is written to profile-<name>.txt.
    """
    device, (blocks, calls) = section.device, (1, 1) if section.tiny else (BLOCKS, CALLS)
    for _ in range(1 if section.tiny else WARMUP):
        work()

    def block() -> None:
        for _ in range(calls):
            work()

    if device.type != "cuda":
        return {"ms": 1e3 * measure.seconds(block, device) / calls}
    synchronize(device)
    torch.cuda.empty_cache()  # of the trials of cuDNN, and of compilation
    torch.cuda.reset_peak_memory_stats(device)
    ms = 1e3 * statistics.median(measure.seconds(block, device) for _ in range(blocks)) / calls
    gib = torch.cuda.max_memory_reserved(device) / 2**30
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(PROFILED):
            work()
        synchronize(device)
    if name is not None:
        table = profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)
        (section.folder / f"profile-{name}.txt").write_text(table)
    kernels, busy = kernels_and_time(profiled.events())
    if not kernels:  # the driver does not permit profiling
        return {"ms": ms, "gib": gib}
    # the profiler makes the host slower, but not the kernels: their time is compared with that without it
    return {"ms": ms, "gib": gib, "kernels": kernels / PROFILED, "idle": max(0.0, 1 - busy / PROFILED / ms)}


def kernels_and_time(events: Iterable[Any]) -> tuple[int, float]:
    """Number of the kernels and copies on the device, and time in which at least one of them runs (ms).

    The profiler also lists ranges that the host has named, such as those of the optimizer, as events of the
    device. They are left out.
    """
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    busy = last = 0.0
    for start, end in ranges:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return len(ranges), busy / 1e3  # the ranges are in microseconds


def release(device: torch.device) -> None:
    """Free the memory of the last row's work."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
