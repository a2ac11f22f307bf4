"""How the time and the traffic of a loss grow with the number of processes: python scripts/scaling.py [--rows 512] ...

Each process has the same number of rows, whatever their number W is, so what one of them does should not grow. Counted are the
bytes of the tensors that a process hands to collectives in one step, forward and backward, and what of it a ring sends from each
process; timed is the processor time of one process, in one thread (gloo, on this machine, whose cores wall-clock would count).
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
from ssl_runner.loss import BarlowTwins, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Labels, Views

LOSSES = {
    "VICReg": VICReg,
    "Barlow Twins": BarlowTwins,
    "SimCLR (squared)": SpectralContrastive,
    "SimCLR": SimCLR,
}
CLASSES = 10


class Traffic:
    """Counts what is handed to collectives: `payload`, the bytes of the whole tensor, and `sent`, a process's part in a ring."""

    def __init__(self) -> None:
        self.payload = self.sent = 0.0
        for name, passes in (("all_reduce", 2), (distributed.ALL_GATHER, 1), (distributed.REDUCE_SCATTER, 1)):
            setattr(dist, name, self.counting(getattr(dist, name), passes))

    def counting(self, collective: Callable[..., Any], passes: int) -> Callable[..., Any]:
        def counted(*tensors: torch.Tensor, **options: Any) -> Any:
            whole = max(tensor.nbytes for tensor in tensors)
            self.payload += whole
            self.sent += passes * whole * (dist.get_world_size() - 1) / dist.get_world_size()
            return collective(*tensors, **options)

        return counted


def measured(rows: int, columns: int, steps: int) -> list[dict[str, Any]]:
    """A row for every loss and relation, of this process."""
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
    parser.add_argument("--rows", type=int, default=512, help="rows of Z in each process")
    parser.add_argument("--columns", type=int, default=512, help="K")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", help="a CSV to write")
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
        rows += queue.get()
        for process in children:
            process.join()
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
