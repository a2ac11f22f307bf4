"""Time and memory of the losses against N, K and V, and of a training step against image and data set size.

Fitted exponents are slopes of log time or log memory over log size, by least squares over the larger half of
the sizes. Predicted exponents follow from the number of operations.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks import measure
from benchmarks.chart import plt
from ssl_runner.backbone import convnet
from ssl_runner.data.images import Images
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.projector import mlp
from ssl_runner.relation import Labels, Relation, Views
from ssl_runner.views import Augment

LOSSES: dict[str, Loss] = {"VICReg": VICReg(), "Barlow": BarlowTwins(), "SimCLR": SimCLR()}
N, K = 1024, 512  # rows and columns of Z when they are not varied
Works = dict[int, measure.Work]  # size -> work


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per quantity and size: quantity, against, size, ms, peak_mib, and the exponents of the line.

    The exponents are ms_fitted, ms_predicted, mib_fitted and mib_predicted. A fitted exponent is None if the
    values are too small to measure.
    """
    more = 1 if full else 0
    rows = []
    for name, loss in LOSSES.items():
        pairwise = name == "SimCLR"
        by_N: Works = {
            n: loss_step(loss, n, 128 if pairwise else K, 2, device)
            for n in powers(10 if pairwise else 11, (13 if pairwise else 14) + more)
        }
        by_K: Works = {k: loss_step(loss, N, k, 2, device) for k in powers(9, 12 + more)}
        by_V: Works = {V: loss_step(loss, 2048, 128 if pairwise else K, V, device) for V in powers(1, 5)}
        rows += line(name, "N", by_N, 2 if pairwise else 1, 1, device, full)
        rows += line(name, "K", by_K, 1 if pairwise else 2, 1 if pairwise else 2, device, full)
        rows += line(name, "V, N fixed", by_V, 0, 0, device, full)
    labels = torch.arange(16_384, device=device) % 100
    rows += line(
        "G@Z, views",
        "V, N fixed",
        {V: product(views(16_384, V, device), K) for V in powers(1, 6)},
        0,
        0,
        device,
        full,
    )
    by_classes: Works = {c: product(Labels(labels % c, c), K) for c in powers(1, 6)}
    rows += line("G@Z, labels", "classes", by_classes, 0, 0, device, full)
    rows += line(
        "training step",
        "pixels per side",
        {side: training(side, device) for side in powers(5, 7 + more)},
        2,
        2,
        device,
        full,
    )
    images: Works = {n: gathering(n, device) for n in powers(13, 17 + more)}
    rows += line("batch of a step", "images in the data set", images, 0, 0, device, full)
    return rows


def powers(low: int, high: int) -> list[int]:
    """Return 2**low, ..., 2**high."""
    return [2**p for p in range(low, high + 1)]


def line(
    quantity: str, against: str, works: Works, time: float, memory: float, device: torch.device, full: bool
) -> list[dict[str, Any]]:
    """One row per size. Memory is measured first, in order of size; then all sizes are timed in turn.

    The smallest size runs once before, which loads code and fills caches.
    """
    next(iter(works.values()))()
    peaks = [measure.peak_memory(work, device) for work in works.values()]
    times = measure.interleaved(
        {str(size): work for size, work in works.items()}, device, 20.0 if full else 2.0, 7 if full else 3
    )
    ms = [1e3 * seconds for seconds in times.values()]
    exponents = {
        "ms_fitted": exponent(list(works), ms),
        "ms_predicted": time,
        "mib_fitted": exponent(list(works), peaks),
        "mib_predicted": memory,
    }
    return [
        {"quantity": quantity, "against": against, "size": size, "ms": t, "peak_mib": peak} | exponents
        for size, t, peak in zip(works, ms, peaks, strict=True)
    ]


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Slope of log value over log size, by least squares over the larger half of the sizes, at least three.

    Returns None if a value is missing or not positive.
    """
    tail = slice(min(len(sizes) // 2, len(sizes) - 3), None)
    y = np.array([value or 0.0 for value in values[tail]])
    if (y <= 0).any():
        return None
    return float(np.polyfit(np.log(sizes[tail]), np.log(y), 1)[0])


def views(rows: int, V: int, device: torch.device) -> Views:
    """Relation between V views of rows / V images."""
    return Views(rows // V, V, device=device)


def loss_step(loss: Loss, rows: int, columns: int, V: int, device: torch.device) -> measure.Work:
    """Forward and backward pass of a loss on random Z of shape (rows, columns)."""
    Z, G = torch.randn(rows, columns, device=device, requires_grad=True), views(rows, V, device)

    def step() -> None:
        Z.grad = None
        loss(Z, G).backward()

    return step


def product(G: Relation, columns: int) -> measure.Work:
    """Product G @ Z with random Z of shape (N, columns)."""
    return partial(G.__matmul__, torch.randn(G.num_rows, columns, device=G.degrees.device))


def training(side: int, device: torch.device, n: int = 32) -> measure.Work:
    """Augmentation, forward and backward pass of a small convnet on n images of side x side pixels."""
    augment = Augment(
        {"all": {"crop": {"scale": [0.2, 1.0]}, "flip": 0.5, "jitter": {"p": 0.8, "brightness": 0.4}}}
    )
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=device)
    mean, std = torch.zeros(3, device=device), torch.ones(3, device=device)
    body = convnet(3, side)
    network = nn.Sequential(body, mlp(body.width, 256, 2, 128)).to(device)
    loss, G, generator = VICReg(), Views(n, 2, device=device), torch.Generator(device).manual_seed(0)

    def step() -> None:
        network.zero_grad()
        loss(network(augment(images, 2, mean, std, generator)), G).backward()

    return step


def gathering(images: int, device: torch.device, steps: int = 16, batch_size: int = 256) -> measure.Work:
    """Gathering the batches of `steps` steps from a data set of `images` images.

    The indices are drawn beforehand, as once per epoch in training.
    """
    pixels = torch.zeros(images, 3, 32, 32, dtype=torch.uint8, device=device)
    data = Images(
        pixels, torch.zeros(images, dtype=torch.long, device=device), torch.arange(images), resident=True
    )
    order = torch.randperm(images)[: steps * batch_size]

    def epoch() -> None:
        for _ in data.batches(order, batch_size, device):
            pass

    return epoch


def draw(rows: pd.DataFrame, path: Path) -> None:
    """One log-log panel per quantity and variable: time and memory relative to the smallest size."""
    lines = rows.groupby(["quantity", "against"], sort=False)
    across = 3
    down = -(-len(lines) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(11, 2.6 * down), sharey=True, layout="constrained", squeeze=False
    )
    for axes, ((quantity, against), line) in zip(panels.flat, lines, strict=False):
        exponents = []
        for name, column, label, style in (
            ("ms", "ms", "time", "o-"),
            ("mib", "peak_mib", "memory", "s--"),
        ):
            values = line[column].where(line[column] > 0)
            axes.plot(line["size"], values / values.dropna().iloc[:1].sum(), style, label=label)
            fitted, predicted = line[f"{name}_fitted"].iloc[0], line[f"{name}_predicted"].iloc[0]
            exponents += [f"{label} {fitted:.2f} ({predicted:g})"] if pd.notna(fitted) else []
        axes.set(xscale="log", yscale="log", xlabel=against)
        axes.set_xticks(line["size"], line["size"])
        axes.minorticks_off()
        axes.set_title(f"{quantity}: {', '.join(exponents)}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(lines) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("relative to smallest")
    panels.flat[0].legend(frameon=False)
    figure.suptitle("Growth: fitted exponents (predicted in brackets)", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
