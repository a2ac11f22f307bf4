"""Time and traffic of the losses against the number of processes W.

    python scripts/scaling.py [--rows 512] ...

The number of rows per process is the same for all W, so ideally the work per process is constant. The script
reports, per process and for one forward and backward pass, the bytes of the tensors passed to collectives,
the bytes that a ring algorithm sends, and the CPU time in ms with one thread. All processes run on this
machine with gloo and share its cores, so wall-clock time would not be meaningful.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from ssl_runner import distributed
from ssl_runner.distributed.collectives import ALL_GATHER, REDUCE_SCATTER
from ssl_runner.loss import BarlowTwins, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Labels, Views

LOSSES = {
    "VICReg": VICReg,
    "Barlow Twins": BarlowTwins,
    "spectral contrastive": SpectralContrastive,
    "SimCLR": SimCLR,
}
CLASSES = 10


class Traffic:
    """Count the bytes passed to collectives.

    payload   bytes of the full tensors
    sent      bytes that one process sends if the collectives use ring algorithms
    """

    def __init__(self) -> None:
        self.payload = self.sent = 0.0
        for name, passes in (("all_reduce", 2), (ALL_GATHER, 1), (REDUCE_SCATTER, 1)):
            setattr(dist, name, self.counting(getattr(dist, name), passes))

    def counting(self, collective: Callable[..., Any], passes: int) -> Callable[..., Any]:
        """Wrap a collective; `passes` is the number of times a ring algorithm passes the tensor around."""

        def counted(*tensors: torch.Tensor, **options: Any) -> Any:
            whole = max(tensor.nbytes for tensor in tensors)
            self.payload += whole
            self.sent += passes * whole * (dist.get_world_size() - 1) / dist.get_world_size()
            return collective(*tensors, **options)

        return counted


def measured(rows: int, columns: int, steps: int) -> list[dict[str, Any]]:
    """Measure this process. Returns one row per loss and relation: traffic per step and median CPU time.

    One warm-up step precedes the `steps` timed ones.
    """
    traffic, table = Traffic(), []
    for name, loss in LOSSES.items():
        for relation in ("views", "labels"):
            seconds = []
            for step in range(steps + 1):
                torch.manual_seed(step * 1000 + distributed.rank())
                Z = torch.randn(rows, columns, requires_grad=True)
                y = torch.randint(0, CLASSES, (rows,))
                start, traffic.payload, traffic.sent = time.process_time(), 0.0, 0.0
                G = Views(rows // 2, 2) if relation == "views" else Labels(y, CLASSES)
                loss()(Z, G).backward()
                seconds.append(time.process_time() - start)
            row = {
                "loss": name,
                "relation": relation,
                "W": distributed.world_size(),
                "payload_bytes": int(traffic.payload),
            }
            table.append(row | {"ring_bytes": int(traffic.sent), "ms": 1000 * statistics.median(seconds[1:])})
    return table


def child(rank: int, W: int, port: int, queue: Any, arguments: tuple[int, int, int]) -> None:
    """Run `measured` as one of W processes. Rank 0 puts its rows into the queue."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(W)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start()
    table = measured(*arguments)
    if rank == 0:
        queue.put(table)
    distributed.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512, help="rows of Z per process")
    parser.add_argument("--columns", type=int, default=512, help="columns K of Z")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="values of W")
    parser.add_argument("--steps", type=int, default=15, help="number of timed steps")
    parser.add_argument("--out", help="CSV file to write")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    for W in given.processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = context.SimpleQueue()
        arguments = (given.rows, given.columns, given.steps)
        children = [
            context.Process(target=child, args=(rank, W, port, queue, arguments)) for rank in range(W)
        ]
        for process in children:
            process.start()
        for process in children:
            process.join()
        if any(process.exitcode for process in children):
            raise SystemExit(f"W={W}: a process failed, see its message above")
        rows += queue.get()
    table = pd.DataFrame(rows)
    if given.out:
        table.to_csv(given.out, index=False)
    print(
        table.pivot(index=["loss", "relation"], columns="W", values=["payload_bytes", "ring_bytes", "ms"])
        .round(1)
        .to_string()
    )


if __name__ == "__main__":
    main()
