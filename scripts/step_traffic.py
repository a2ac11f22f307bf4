"""Kernels and memory traffic of a training step of ResNet-18 with synchronised batch norm.

    python scripts/step_traffic.py [--rows 1024] [--side 32]

Counts forward and backward pass of the network under bf16 autocast, without views, loss, optimizer and the
all-reduce of the gradient. Every ATen operation that is not a view counts as one kernel, which
reads its inputs and writes its outputs once. Batch norm counts as the kernels that a GPU runs for it: see
KERNELS. Bytes are a constant plus a multiple of the rows, so two small batches give those of a large one. The
process group is PyTorch's `fake` one, of two ranks.
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ssl_runner import distributed
from ssl_runner.backbone import resnet
from ssl_runner.distributed.batch_norm import SyncBatchNorm

GIB = 2**30
# Kernels and bytes of a local batch norm on a GPU, from the bytes of inputs and outputs. Forward reads x
# for the statistics, then reads x and writes y. Backward reads x and the gradient twice, and writes one.
KERNELS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "native_batch_norm": (2, lambda read, written: 2 * read + written),
    "native_batch_norm_backward": (2, lambda read, written: 2 * read + written),
}


class Counter(TorchDispatchMode):
    """Count kernels and bytes of the operations that run in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0
        self.paused = False

    def add(self, inputs: Any, outputs: Any, kernels: int = 1, cost: Callable | None = None) -> None:
        read, written = (
            sum(leaf.nbytes for leaf in tree_flatten(part)[0] if isinstance(leaf, Tensor))
            for part in (inputs, outputs)
        )
        self.kernels += kernels
        self.bytes += cost(read, written) if cost else read + written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = func.is_view or name in ("detach", "_unsafe_view", "_reshape_alias", "alias")
        if not is_view and not name.startswith(("empty", "new_empty")) and not self.paused:
            self.add((args, kwargs), result, *KERNELS.get(name, (1, None)))
        return result

    def kernel(self, inputs: Any, make: Callable[[], Any]) -> Any:
        """Return make(), counted as one kernel that reads `inputs` and writes what `make` returns."""
        self.paused = True
        made = make()
        self.paused = False
        self.add(inputs, made)
        return made

    def stand_ins(self) -> dict[str, Callable]:
        """The kernels for CUDA, with outputs of the right shape and without the right values."""

        def stats(x: Tensor, eps: float) -> Any:
            return self.kernel(x, lambda: (torch.zeros(x.shape[1]), torch.ones(x.shape[1])))

        def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Any:
            return self.kernel((x, weight, bias, mean, inverse), lambda: torch.zeros_like(x))

        def reduce(g: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, *others: Any) -> Any:
            return self.kernel((g, x, mean, inverse), lambda: tuple(torch.zeros(4, x.shape[1])))

        def backward(g: Tensor, x: Tensor, *others: Any) -> Any:
            return self.kernel((g, x, others), lambda: torch.zeros_like(x))

        names = ("batch_norm_stats", "batch_norm_elemt", "batch_norm_backward_reduce")
        return dict(zip((*names, "batch_norm_backward_elemt"), (stats, elemt, reduce, backward), strict=True))


def step(network: nn.Module, rows: int, side: int, fused: bool) -> tuple[int, int]:
    """Kernels and bytes of a forward and backward pass on `rows` images."""
    counter = Counter()
    x = torch.randn(rows, 3, side, side).contiguous(memory_format=torch.channels_last)
    path = SyncBatchNorm.fused if fused else SyncBatchNorm.normalized
    network.zero_grad(set_to_none=True)
    with (
        mock.patch.object(SyncBatchNorm, "synchronized", path),
        mock.patch.multiple(torch, **counter.stand_ins()),
        torch.autocast("cpu", torch.bfloat16),
        counter,
    ):
        network(x).sum().backward()
    return counter.kernels, counter.bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="views per step and process")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    given = parser.parse_args()
    table = []
    for name, sync in (("one GPU", None), ("tensor operations", False), ("CUDA's kernels", True)):
        if sync is not None and not dist.is_initialized():
            dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        body = resnet(3, given.side, "resnet18").to(memory_format=torch.channels_last)
        network = distributed.sync_batchnorm(body)
        (kernels, few), (_, more) = (step(network, rows, given.side, bool(sync)) for rows in (2, 4))
        table.append((name, kernels, round((few + (more - few) / 2 * (given.rows - 2)) / GIB, 1)))
    print(pd.DataFrame(table, columns=["batch norm", "kernels", "GiB"]).to_string(index=False))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
