"""What the figures of `ssl-report` share: colours, panels, axes, and the order of values."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ssl_runner.report.configurations import is_numeric

COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
]  # Okabe and Ito: safe for the colour-blind
INK, PAPER = "#1b1b1c", "#fefeff"
WIDTH = 12.6  # inches of a figure of several columns
LARGEST = 1e100  # larger numbers, which no run writes, overflow in a plot
DPI = 130  # of a PNG file
MIN_FONT = 9  # points of the smallest text
SPLITS = {"val_top1": ("validation", "o", COLOURS[1]), "top1": ("test", "s", COLOURS[0])}
STYLE: Any = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
    **dict.fromkeys(["figure.facecolor", "savefig.facecolor"], PAPER),
    **dict.fromkeys(["legend.fontsize", "legend.title_fontsize"], MIN_FONT),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ssl-report",
    "text.parse_math": False,  # the value of an option may contain a dollar sign
}


@dataclass
class Picture:
    """A figure, and lines on what it leaves out."""

    figure: Figure
    notes: list[str] = field(default_factory=list)


def panels(number: int, extra: float = 0, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels in up to three columns and a common y axis, `extra` inches taller."""
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(max(5.5, WIDTH / 3 * columns), 3.2 * rows + extra), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=sharex).flat)
    for ax in axes[number:]:
        ax.set_visible(False)
    for ax in axes[:number]:
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, axes[:number]


def splits_of(results: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """SPLITS without those that no run was scored on: runs without test images have no test top-1."""
    return {value: style for value, style in SPLITS.items() if results[value].notna().any()}


def varying(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    """The keys with more than one value."""
    return [key for key in keys if frame[key].nunique() > 1]


def distinguishing(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    """The keys with more than one value, or with a value in some rows only."""
    return [key for key in keys if frame[key].nunique(dropna=False) > 1]


def in_order(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The rows in ascending order of the keys, numbers by size."""
    numbers = {key: pd.to_numeric(frame[key]) if is_numeric(frame[key]) else frame[key] for key in keys}
    order = pd.DataFrame(numbers, frame.index).sort_values(keys, kind="stable") if keys else frame
    return frame.loc[order.index]


def distinct(values: pd.Series) -> list[Any]:
    """The distinct values in ascending order, numbers by size."""
    return list(dict.fromkeys(in_order(values.dropna().to_frame("value"), ["value"]).value))


def palette(number: int) -> list[str]:
    """Distinct colours, or steps of a colour map for more than there are."""
    if number <= len(COLOURS):
        return COLOURS[:number]
    return [to_hex(step) for step in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, number))]


def limit_to_accuracies(axes: Iterable[Axes]) -> None:
    """Cut y axes in per cent off at 0 and 100."""
    for ax in axes:
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 100))


def set_log_scale(ax: Axes, name: str) -> None:
    """Logarithmic axis x or y with plain numbers."""
    (ax.set_xscale if name == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if name == "x" else ax.yaxis
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def spans_decades(values: pd.Series, factor: float = 30) -> bool:
    """Whether values suit a logarithmic axis: all positive, the largest over `factor` times the smallest."""
    return bool(values.min() > 0 and values.max() > factor * values.min())


def label(row: Mapping[Any, Any]) -> str:
    """`gamma=1, optimizer.lr=0.01`, in lines of up to 44 characters, without missing values.

    `without gamma` if all values are missing.
    """
    text = ", ".join(
        f"{'loss' if key == 'method' else key}={shorten(value)}"
        for key, value in row.items()
        if pd.notna(value)
    )
    return wrapped(text or (f"without {', '.join(row)}" if row else ""))


def wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 44))


def shorten(value: object, longest: int = 24) -> str:
    text = str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
