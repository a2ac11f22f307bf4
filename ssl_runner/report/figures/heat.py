"""Heat maps of mean top-1 over two options, one row per loss."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import binned, effect
from ssl_runner.report.figures.style import (
    MIN_FONT,
    PAPER,
    SPLITS,
    Picture,
    in_order,
    shorten,
    varying,
)

MAX_CELLS = 12  # values of an option; more numbers are binned


def heat(part: Comparison) -> Picture | None:
    """The two options with the largest effect on validation top-1. The panels of a split share their colours.

    Keys with many numbers are binned at their quantiles. Configurations that are not in a panel are noted.
    """
    results = part.results[part.results[list(SPLITS)].notna().any(axis=1)]
    notes, grids = [], {}
    for method, of_one in results.groupby("method"):
        keys = sorted(varying(of_one, part.keys), key=lambda key: -effect(of_one, key))[:2]
        total = of_one.configuration.nunique()
        if len(keys) < 2:
            notes.append(f"Not in the map: {total} of {method}, in which fewer than two options differ.")
            continue
        complete = of_one[of_one[keys].notna().all(axis=1)]
        if lacking := total - complete.configuration.nunique():
            notes.append(f"Not in the map: {lacking} of {method}, without {' or '.join(keys)}.")
        if len(complete):
            grids[str(method)] = keys, cells(complete, keys)
    if not grids:
        return None
    values = {
        split: np.concatenate([grid[split].to_numpy().ravel() for _, grid in grids.values()])
        for split in SPLITS
    }
    splits = {split: name for split, (name, _, _) in SPLITS.items() if np.isfinite(values[split]).any()}
    figure = Figure(figsize=(1 + 5.8 * len(splits), 0.6 + 3.2 * len(grids)), layout="constrained")
    axes = figure.subplots(len(grids), len(splits), squeeze=False)
    for (split, name), column in zip(splits.items(), axes.T, strict=True):
        norm = Normalize(np.nanmin(values[split]), np.nanmax(values[split]))
        for (method, (keys, grid)), ax in zip(grids.items(), column, strict=True):
            mesh = draw_cells(ax, grid[split], norm)
            ax.set(xlabel=keys[1], ylabel=keys[0], title=f"{method}: {name}")
        figure.colorbar(mesh, ax=column, label=f"mean {name} top-1 (%)").outline.set_visible(False)
    return Picture(figure, notes)


def cells(results: pd.DataFrame, keys: list[str]) -> dict[str, pd.DataFrame]:
    """Split -> mean top-1 in per cent, of shape (values of the first key, values of the second)."""
    labelled, orders = results.copy(), []
    for key in keys:
        bins = binned(results[key], MAX_CELLS // 2, MAX_CELLS)
        labelled[key] = bins.map(
            lambda bin: f"{bin.left:.6g}..{bin.right:.6g}" if isinstance(bin, pd.Interval) else bin
        )
        orders.append(list(dict.fromkeys(labelled[key][in_order(results, [key]).index])))
    grids = {}
    for split in SPLITS:
        means = labelled.groupby([*keys, "configuration"])[split].mean().groupby(keys).mean().unstack()
        grids[split] = 100 * means.reindex(index=orders[0], columns=orders[1]).astype(float)
    return grids


def draw_cells(ax: Axes, table: pd.DataFrame, norm: Normalize) -> QuadMesh:
    """Cells in colours, with numbers if there is room; returns the mesh for a colour bar."""
    means = np.ma.masked_invalid(table.to_numpy(float))
    mesh = ax.pcolormesh(means, cmap="viridis", norm=norm, edgecolors=PAPER, linewidth=1)
    ax.set_xticks(
        np.arange(table.shape[1]) + 0.5,
        [shorten(value) for value in table.columns],
        rotation=30 if table.shape[1] > 6 else 0,
    )
    ax.set_yticks(np.arange(table.shape[0]) + 0.5, [shorten(value) for value in table.index])
    ax.grid(visible=False)
    for i, j in np.argwhere(~np.ma.getmaskarray(means)) if means.size <= 64 else []:
        colour = "white" if norm(means[i, j]) <= 0.5 else "black"
        text = f"{means[i, j]:.1f}"
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=MIN_FONT, color=colour)
    return mesh
