"""Draw docs/rank_vs_tau.png: the rank of the optimum of VICReg against gamma, and of SimCLR against tau.

Nothing is trained. The positives are nearest neighbours of digits, in pixels.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ssl_runner.data.readers import mnist5k
from ssl_runner.loss import Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import KNearest, Relation
from ssl_runner.theory import optimum

ROWS, NEIGHBORS, K = 200, 3, 100
GAMMAS = np.geomspace(0.1, 10, 100)  # for alpha = 1
TAUS = np.geomspace(0.2, 20, 13)


def main() -> None:
    """Parse the command line and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/rank_vs_tau.png"))
    out = parser.parse_args().out
    matplotlib.use("Agg")
    draw(nearest_digits()).savefig(out, dpi=130, bbox_inches="tight")
    print(out)


def nearest_digits() -> Relation:
    """Each of the first digits of `mnist5k` is a positive of its nearest neighbours."""
    X = mnist5k().images[:ROWS].flatten(1).float()
    return KNearest(torch.cdist(X, X).fill_diagonal_(torch.inf).topk(NEIGHBORS, largest=False).indices)


def ranks(losses: Iterable[Loss], G: Relation) -> list[int | None]:
    """Rank of the optimum of each loss."""
    return [optimum(loss, G, K).rank for loss in losses]


def draw(G: Relation) -> Figure:
    """One panel for VICReg and one for SimCLR, with the rank of the spectral contrastive loss in both."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    vicreg = ranks((VICReg(1.0, 1.0, gamma, variance="squared") for gamma in GAMMAS), G)
    left.plot(GAMMAS, vicreg, color="#1b6ca8", label="VICReg, squared variance")
    left.set(xlabel="γ / α (weight of invariance / weight of variance)", ylabel="rank of the optimal Z")
    simclr = ranks((SimCLR(tau) for tau in TAUS), G)
    right.plot(TAUS, simclr, "o-", color="#c8553d", ms=4, label="SimCLR (InfoNCE)")
    right.set(xlabel="τ (temperature)")
    [positive] = ranks([SpectralContrastive()], G)
    for ax in (left, right):
        ax.axhline(positive, color="gray", ls=":", label=f"spectral contrastive: {positive}")
        ax.set(xscale="log", ylim=(0, 1.05 * K))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.82))
    figure.suptitle(
        f"Positives: {NEIGHBORS} nearest neighbours of {ROWS} digits, K = {K}; no training", fontsize=11
    )
    return figure


if __name__ == "__main__":
    main()
