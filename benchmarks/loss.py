"""Forward and backward pass of the losses, compared with lightly and stable-pretraining.

SimCLR is also run at a size for which the similarity matrix does not fit in memory. The peers' losses take
two views; for V > 2 they are averaged over all pairs of views. For V = 2 the values must agree where the
definitions do (docs/losses.md). This is checked in float64 on views with equal statistics.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.relation import Views

PairLoss = Callable[[Tensor, Tensor], Tensor]
OURS: dict[str, Loss] = {"VICReg": VICReg(), "Barlow": BarlowTwins(center=True), "SimCLR": SimCLR(0.5)}
SIZES = ((512, 2048), (2048, 512))  # (number of images, K)


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per work and tool: work, tool, ms, ratio, peak_mib, agree.

    `ms` is the median time of a forward and backward pass, `ratio` this time divided by ours, and `agree` the
    relative difference of the loss value from ours (None if the definitions differ). Raises RuntimeError if
    values that should agree do not.
    """
    theirs = peers()
    agreements = {tool: agreement(tool, peer, device) for tool, peer in theirs.items()}
    rows = []
    for name in OURS:
        for n, K in SIZES:
            quickest = (n == 512) == (name == "SimCLR")  # the faster of the two sizes for the peers
            for V in (2, 4, 8) if full else (2, 8) if quickest else (2,):
                tools = theirs if full or V == 2 else {"lightly": theirs["lightly"]}
                Z, G = torch.randn(V * n, K, device=device, requires_grad=True), Views(n, V, device=device)
                works: dict[str, measure.Work] = {"ours": partial(step, OURS[name], Z, G)}
                works |= {
                    tool: partial(step, partial(over_pairs, peer[name]), Z, V) for tool, peer in tools.items()
                }
                agree = {tool: agreements[tool].get(name) if V == 2 else None for tool in tools}
                rows += compared(
                    f"{name} {n}x{K} V={V}", works, agree, device, 20.0 if full else 2.0, 5 if full else 1
                )
    return rows + large(device, full)


def peers() -> dict[str, dict[str, PairLoss]]:
    """The losses of the other libraries, by tool and name."""
    import lightly.loss
    import stable_pretraining.losses

    return {
        "lightly": {
            "VICReg": lightly.loss.VICRegLoss(),
            "Barlow": lightly.loss.BarlowTwinsLoss(),
            "SimCLR": lightly.loss.NTXentLoss(0.5),
        },
        "stable-pretraining": {
            "VICReg": stable_pretraining.losses.VICRegLoss(),
            "Barlow": stable_pretraining.losses.BarlowTwinsLoss(),
            "SimCLR": stable_pretraining.losses.NTXEntLoss(0.5),
        },
    }


def compared(
    work: str,
    works: dict[str, measure.Work],
    agree: dict[str, float | None],
    device: torch.device,
    budget: float,
    least: int,
) -> list[dict[str, Any]]:
    """Measure memory, then time, of all contenders for one piece of work."""
    peaks = {tool: measure.peak_memory(call, device) for tool, call in works.items()}
    times = measure.interleaved(works, device, budget, least)
    ratios = measure.versus(times)
    return [
        {
            "work": work,
            "tool": t,
            "ms": 1e3 * times[t],
            "ratio": ratios[t],
            "peak_mib": peaks[t],
            "agree": agree.get(t),
        }
        for t in works
    ]


def step(loss: Callable[..., Tensor], Z: Tensor, *relation: Any) -> None:
    """Forward and backward pass."""
    Z.grad = None
    loss(Z, *relation).backward()


def over_pairs(loss: PairLoss, Z: Tensor, V: int) -> Tensor:
    """A loss of two views, averaged over all pairs of V views."""
    return torch.stack([loss(a, b) for a, b in combinations(Z.chunk(V), 2)]).mean()


def dense(Z: Tensor) -> Tensor:
    """Plain NT-Xent: full similarity matrix and autograd."""
    Z, N = F.normalize(Z), len(Z)
    S = (Z @ Z.T / 0.5).masked_fill(torch.eye(N, dtype=torch.bool, device=Z.device), -torch.inf)
    return F.cross_entropy(S, (torch.arange(N, device=Z.device) + N // 2) % N)


def large(device: torch.device, full: bool) -> list[dict[str, Any]]:
    """SimCLR against the dense form at N = 8,192, and alone at N = 32,768.

    At N = 32,768 the dense form would need about 20 GiB.
    """
    K = 128
    Z = torch.randn(32_768, K, device=device, requires_grad=True)
    whole = partial(step, OURS["SimCLR"], Z, Views(len(Z) // 2, 2, device=device))
    taken: list[float] = []
    peak = measure.peak_memory(lambda: taken.append(measure.seconds(whole, device)), device)
    if full:
        taken = [measure.interleaved({"ours": whole}, device, 60.0)["ours"]]
    Z = torch.randn(8192, K, device=device, requires_grad=True)
    G = Views(len(Z) // 2, 2, device=device)
    works: dict[str, measure.Work] = {
        "ours": partial(step, OURS["SimCLR"], Z, G),
        "dense": partial(step, dense, Z),
    }
    agree: dict[str, float | None] = {
        "dense": difference(OURS["SimCLR"](Z, G), dense(Z), "SimCLR and its dense form", 1e-5)
    }
    rows = compared(f"SimCLR N=8192 K={K}", works, agree, device, 20.0 if full else 5.0, 3 if full else 1)
    alone = {
        "work": f"SimCLR N=32768 K={K}",
        "tool": "ours",
        "ms": 1e3 * taken[0],
        "ratio": 1.0,
        "peak_mib": peak,
        "agree": None,
    }
    return [*rows, alone]


def agreement(tool: str, peer: dict[str, PairLoss], device: torch.device) -> dict[str, float]:
    """Relative difference between a peer's loss values and ours. Raises RuntimeError if it is too large.

    The second view contains the rows of the first in reverse order, so both have the same statistics.

    VICReg: the peer computes the covariance of each view with the divisor n - 1, ssl_runner that of both
    views with the divisor 2n - 1. Z is scaled to compensate.

    Barlow Twins: stable-pretraining uses the divisor n - 1 in the standard deviation but n in the
    correlation, so C_kk is not 1 for equal views. It is not compared.
    """
    n, K = 64, 16
    a = (
        2
        * torch.randn(n, K, dtype=torch.float64, device=device)
        @ torch.randn(K, K, dtype=torch.float64, device=device)
        / 8
    )
    Z, G = torch.cat([a, a.flip(0)]), Views(n, 2, device=device)
    theirs = {name: loss(*Z.chunk(2)) for name, loss in peer.items()}
    f = (2 * n - 2) / (2 * n - 1)
    found = {
        "VICReg": difference(VICReg(25, 2, 25 * f)(Z / f**0.5, G) / K, theirs["VICReg"], "VICReg", 1e-9),
        "SimCLR": difference(SimCLR(0.5)(Z, G), theirs["SimCLR"], "SimCLR", 1e-5),
    }
    if tool == "lightly":
        found["Barlow"] = difference(
            BarlowTwins(5e-3, center=True)(Z, G), theirs["Barlow"], "Barlow", 1e-4
        )  # a larger tolerance, as eps differs
    return found


def difference(ours: Tensor, theirs: Tensor, what: str, most: float) -> float:
    """Relative difference of two values. Raises RuntimeError if it exceeds `most`."""
    found = abs(ours.item() / theirs.item() - 1)
    if not found <= most:
        raise RuntimeError(f"{what}: ssl_runner gives {ours.item():.9g}, the peer {theirs.item():.9g}")
    return found
