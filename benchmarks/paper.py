"""On paper: the FLOPs and bytes of one training step, counted operation by operation, and the time that a GPU needs for them.

Nothing is timed. The network is run on tensors without data; views, loss and optimiser on the CPU, with the sizes of the real
step. Bytes are what each operation reads and writes if nothing stays in a cache and nothing is fused: what eager execution moves.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.picture import plt
from ssl_runner import optimizer
from ssl_runner.backbone import resnet
from ssl_runner.config.compose import CONF
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.projector import mlp
from ssl_runner.relation import Views
from ssl_runner.views import policy

BATCH, V, K, SIDE = 512, 2, 256, 32
PEAK = {"bf16": 989e12, "fp32": 67e12}  # FLOP/s of an H100 SXM, dense (Nvidia's data sheet)
BANDWIDTH = 3.35e12  # bytes/s, the same
LOSSES: dict[str, Callable[[], Loss]] = {"SimCLR": SimCLR, "VICReg": VICReg, "Barlow Twins": BarlowTwins}


class Traffic(TorchDispatchMode):
    """Counts kernels and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.kernels += 1
        return out


def counted(work: Callable[[], Any]) -> tuple[float, int, int]:
    """FLOPs of products and convolutions, bytes and kernels of one call."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        work()
    return float(flops.get_total_flops()), traffic.bytes, traffic.kernels


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """A row for each part of a step, and the floor of the whole: the larger of FLOPs over peak and bytes over bandwidth."""
    N = BATCH * V
    rows: list[dict[str, Any]] = []

    def add(work: str, tool: str, unit: str, count: tuple[float, int, int], scale: float = 1.0) -> None:
        flops, moved, kernels = count
        ms = 1000 * max(flops / PEAK[unit], moved * scale / BANDWIDTH)
        rows.append(
            {
                "work": work,
                "tool": tool,
                "gflop": flops / 1e9,
                "gib": moved * scale / 2**30,
                "kernels": kernels,
                "floor_ms": ms,
            }
        )

    with FakeTensorMode():
        backbone = resnet(3, SIDE, "resnet18")
        network = nn.Sequential(backbone, mlp(backbone.width, 512, 2, K))
        X = torch.empty(N, 3, SIDE, SIDE)
        add(
            "forward and backward",
            "resnet18",
            "bf16",
            counted(lambda: network(X).sum().backward()),
            scale=0.5,
        )  # 2 bytes, not 4
    for name in ("simclr", "vicreg"):
        augment = instantiate(OmegaConf.load(CONF / "views" / f"{name}.yaml"), _convert_="all")
        images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
        draws = torch.Generator().manual_seed(0)
        with mock.patch.object(views, "row_by_row", policy.augment_batch):  # as on a GPU
            add(
                "views",
                name,
                "fp32",
                counted(partial(augment, images, V, torch.full((3,), 0.5), torch.full((3,), 0.25), draws)),
            )
    for name, loss in LOSSES.items():
        Z = torch.randn(N, K, requires_grad=True)
        add("G and loss, forward and backward", name, "fp32", counted(partial(descend, loss(), Z)))
    body = nn.Sequential(resnet(3, SIDE, "resnet18"), mlp(512, 512, 2, K))
    adamw = optimizer.build([body], torch.optim.AdamW, lr=1e-3, weight_decay=1e-2)
    for parameter in body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()  # makes its state
    add("optimiser", "AdamW", "fp32", counted(adamw.step))
    return rows


def descend(loss: Loss, Z: Tensor) -> None:
    loss(Z, Views(BATCH, V)).backward()


def draw(rows: pd.DataFrame, path: Path) -> None:
    """A bar for each part: its floor in milliseconds."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    labels = rows.work + ": " + rows.tool
    bars = axes.barh(labels[::-1], rows.floor_ms[::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xscale="log", xlabel="milliseconds at the least, on an H100")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
