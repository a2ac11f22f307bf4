"""Roofline estimate: FLOPs, bytes and kernels of one training step, and the minimum time for them on a GPU.

Nothing is timed. The network runs on fake tensors under bf16 autocast; views, loss and optimiser run on the
CPU with the sizes of the real step. Every operation is assumed to read its inputs from memory and write its
outputs to it, as in eager execution without caching or fusion. An operation that is not a view counts as one
kernel, and a batch norm as two: one for the statistics, and one that reads its input again. With --full,
torch.compile fuses network and views for the CPU, which takes minutes, and its compiler counts instead.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.chart import plt
from ssl_runner import optimizer
from ssl_runner.backbone import resnet
from ssl_runner.config.compose import CONF
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.projector import mlp
from ssl_runner.relation import Views
from ssl_runner.views import ViewFormat
from ssl_runner.views.augment import views_from_uniforms
from ssl_runner.views.sampler import MAX_DRAWS

BATCH, V, K, SIDE = 512, 2, 256, 32
PEAK = {"bf16": 989e12, "fp32": 67e12}  # FLOP/s of an H100 SXM, dense (Nvidia data sheet)
BANDWIDTH = 3.35e12  # bytes/s of an H100 SXM (same source)
LAUNCH = 5e-6  # seconds of the host for one operation of eager PyTorch and its launch; an assumption
TWO_KERNELS = {"native_batch_norm", "native_batch_norm_backward"}
NO_KERNEL = {"detach", "_unsafe_view", "_reshape_alias", "alias"}  # views that are not declared as such
LOSSES: dict[str, Callable[[], Loss]] = {"SimCLR": SimCLR, "VICReg": VICReg, "Barlow Twins": BarlowTwins}


class Traffic(TorchDispatchMode):
    """Dispatch mode that counts kernels and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        allocates = name.startswith(("empty", "new_empty"))
        if func.is_view or func.namespace != "aten" or name in NO_KERNEL or allocates:
            return out
        read, written = (
            sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(part) if isinstance(leaf, Tensor))
            for part in ((args, kwargs), out)
        )
        passes = 2 if name in TWO_KERNELS else 1
        self.bytes += passes * read + written
        self.kernels += passes
        return out


def counted(work: Callable[[], Any]) -> tuple[float, int, int]:
    """Count FLOPs (of matrix products and convolutions), bytes and kernels of one call."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        work()
    return float(flops.get_total_flops()), traffic.bytes, traffic.kernels


def compiled(work: Callable[[], Any]) -> tuple[int, int]:
    """Count bytes and kernels of one call that compiles, as inductor's scheduler estimates them."""
    from torch._inductor import config, metrics

    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")  # if enabled, it counts
    level, propagates, log.propagate = log.level, log.propagate, False
    log.setLevel(logging.INFO)
    torch.compiler.reset()
    metrics.reset()
    try:
        with config.patch(force_disable_caches=True):  # what is cached is not counted
            work()
    finally:
        log.setLevel(level)
        log.propagate = propagates
    return metrics.num_bytes_accessed, len(metrics.nodes_num_elem)


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per part of a step: work, tool, gflop, gib, kernels, floor_ms, host_ms.

    `floor_ms` is a lower bound on the time of the device: the maximum of FLOPs / peak and bytes / bandwidth.
    `host_ms` is the time in which the host launches the kernels, at LAUNCH each.
    """
    N = BATCH * V
    rows: list[dict[str, Any]] = []

    def add(work: str, tool: str, unit: str, count: tuple[float, int, int]) -> None:
        rows.append({"work": work, "tool": tool, **figures(unit, *count)})

    with FakeTensorMode():
        flops, moved, kernels = counted(partial(descend_network, *resnet18(N)))
        add("forward and backward", "resnet18", "bf16", (flops, moved, kernels))
    if full:
        network, X = resnet18(N)
        network.to(memory_format=torch.channels_last).compile(dynamic=False)
        X = X.contiguous(memory_format=torch.channels_last)
        counts = compiled(partial(descend_network, network, X))
        add("forward and backward, compiled", "resnet18", "bf16", (flops, *counts))
    for name in ("simclr", "vicreg"):
        augment = instantiate(OmegaConf.load(CONF / "views" / f"{name}.yaml"), _convert_="all")
        images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
        uniforms = [torch.rand(BATCH * V, MAX_DRAWS)]  # as on GPUs
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
        views_format = ViewFormat(None, torch.bfloat16, torch.channels_last)
        arguments = (augment.policies, [[*range(V)]], images, mean, std, uniforms, views_format)
        add("views, eager", name, "fp32", counted(partial(views_from_uniforms, *arguments)))
        if full:
            augment.compile()
            add("views, compiled", name, "fp32", (0, *compiled(partial(augment.from_uniforms, *arguments))))
    for name, loss in LOSSES.items():
        Z = torch.randn(N, K, requires_grad=True)
        add("G and loss, forward and backward", name, "fp32", counted(partial(descend, loss(), Z)))
    body = nn.Sequential(resnet(3, SIDE, "resnet18"), mlp(512, 512, 2, K))
    adamw = optimizer.build([body], torch.optim.AdamW, lr=1e-3, weight_decay=1e-2)
    for parameter in body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()  # allocates the optimiser state
    add("optimiser", "AdamW", "fp32", counted(adamw.step))
    return rows


def figures(unit: str, flops: float, moved: int, kernels: int) -> dict[str, float]:
    """The figures of a row, from FLOPs in the arithmetic of `unit`, bytes and kernels."""
    return {
        "gflop": flops / 1e9,
        "gib": moved / 2**30,
        "kernels": kernels,
        "floor_ms": 1000 * max(flops / PEAK[unit], moved / BANDWIDTH),
        "host_ms": 1000 * LAUNCH * kernels,
    }


def resnet18(N: int) -> tuple[nn.Module, Tensor]:
    """ResNet-18 with its projector, and an input of N views in bf16."""
    backbone = resnet(3, SIDE, "resnet18")
    network = nn.Sequential(backbone, mlp(backbone.width, 512, 2, K))
    return network, torch.randn(N, 3, SIDE, SIDE).bfloat16()


def descend_network(network: nn.Module, X: Tensor) -> None:
    """Forward and backward pass under bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        Z = network(X)
    Z.float().sum().backward()


def descend(loss: Loss, Z: Tensor) -> None:
    """Build the relation, then run the forward and backward pass of the loss."""
    loss(Z, Views(BATCH, V)).backward()


def draw(rows: pd.DataFrame, path: Path) -> None:
    """One bar per part: the lower bound on its time in milliseconds."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    labels = rows.work + ": " + rows.tool
    bars = axes.barh(labels[::-1], rows.floor_ms[::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xscale="log", xlabel="minimum time on an H100 (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
