"""Forward and backward of the losses beside lightly and stable-pretraining, and SimCLR where its similarities do not fit.

The peers' losses take two views: for more, a user means them over all pairs of views, and so does this. At V = 2 the values must
agree where the definitions do, in float64 and on views of equal statistics (docs/losses.md); else this raises.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import lightly.loss
import stable_pretraining.losses
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, VICReg
from ssl_runner.relation import Views

PairLoss = Callable[[Tensor, Tensor], Tensor]
OURS: dict[str, Loss] = {"VICReg": VICReg(), "Barlow": BarlowTwins(center=True), "SimCLR": SimCLR(0.5)}
PEERS: dict[str, dict[str, PairLoss]] = {
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
SIZES = ((512, 2048), (2048, 512))  # originals and columns


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """Rows of work, tool, ms (the median of a forward and a backward), ratio (to ours), peak_mib and agree (the relative
    difference of the values from ours, empty where the definitions differ)."""
    agreements = {tool: agreement(peer, device) for tool, peer in PEERS.items()}
    rows = []
    for name in OURS:
        for n, K in SIZES:
            quickest = (n == 512) == (name == "SimCLR")  # of the two sizes, for the peer with its many pairs
            for V in (2, 4, 8) if full else (2, 8) if quickest else (2,):
                tools = PEERS if full or V == 2 else {"lightly": PEERS["lightly"]}
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


def compared(
    work: str,
    works: dict[str, measure.Work],
    agree: dict[str, float | None],
    device: torch.device,
    budget: float,
    least: int,
) -> list[dict[str, Any]]:
    """Memory first, then time, of all contenders for one piece of work."""
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
    """A forward and a backward."""
    Z.grad = None
    loss(Z, *relation).backward()


def over_pairs(loss: PairLoss, Z: Tensor, V: int) -> Tensor:
    """A loss of two views, meant over all pairs of V views."""
    return torch.stack([loss(a, b) for a, b in combinations(Z.chunk(V), 2)]).mean()


def dense(Z: Tensor) -> Tensor:
    """NT-Xent as one writes it down: all similarities at once, and autograd."""
    Z, N = F.normalize(Z), len(Z)
    S = (Z @ Z.T / 0.5).masked_fill(torch.eye(N, dtype=torch.bool, device=Z.device), -torch.inf)
    return F.cross_entropy(S, (torch.arange(N, device=Z.device) + N // 2) % N)


def large(device: torch.device, full: bool) -> list[dict[str, Any]]:
    """SimCLR beside the dense form at N = 8,192, and alone at 32,768, where that would need some 20 GiB."""
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


def agreement(peer: dict[str, PairLoss], device: torch.device) -> dict[str, float]:
    """How far a peer's values are from ours, relative. Views with the same statistics: one is the other upside down.

    VICReg: the peer's covariance is that of one view, over n - 1, where ours is that of both, over 2n - 1; Z is scaled to make up
    for it. stable-pretraining's Barlow Twins divides by the standard deviation over n - 1 and the correlation by n, so that C_kk
    is not 1 for equal views: there is no agreement to be had.
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
    if peer is PEERS["lightly"]:
        found["Barlow"] = difference(
            BarlowTwins(5e-3, center=True)(Z, G), theirs["Barlow"], "Barlow", 1e-4
        )  # eps differs
    return found


def difference(ours: Tensor, theirs: Tensor, what: str, most: float) -> float:
    """The relative difference of two values. Raises RuntimeError where it is more than `most`."""
    found = abs(ours.item() / theirs.item() - 1)
    if not found <= most:
        raise RuntimeError(f"{what}: ours gives {ours.item():.9g}, the peer {theirs.item():.9g}")
    return found
