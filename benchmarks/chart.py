"""Plots of benchmark results."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def bars(rows: pd.DataFrame, path: Path) -> None:
    """One bar per tool and work: its time divided by that of ssl_runner, column `ratio` of `rows`."""
    table = rows.pivot_table(index="work", columns="tool", values="ratio", sort=False)
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.18 * table.size + 0.2 * len(table)), layout="constrained")
    table.iloc[::-1, ::-1].plot.barh(ax=axes, width=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time relative to ssl_runner (> 1: slower than ssl_runner)", ylabel="")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
