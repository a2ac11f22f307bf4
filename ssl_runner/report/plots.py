"""The plots of `ssl-report`, each as SVG and PNG: training curves, top-1 against each swept key, and a heat map over two."""

import io
import re
import warnings
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from ssl_runner.report.read import Run
from ssl_runner.report.tables import is_numeric, number_settings, over_seeds

# Okabe and Ito's colours, told apart by the colour-blind; those that show on white and on black
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
INK, PAPER = "#1b1b1c", "#fefeff"  # of the picture files; the page puts its own in their place
MAP = "viridis"
FEW = 6  # curves that a legend names
NAMES = ("curves", "keys", "heat")
PANELS = 12  # keys that are drawn
CELLS = 30  # values of a key in a heat map; beyond, the settings are points
SPLITS = {"val_top1": ("validation", "o", COLOURS[1]), "top1": ("test", "s", COLOURS[0])}
STYLE: Any = {
    **dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"], INK
    ),
    **dict.fromkeys(["figure.facecolor", "savefig.facecolor"], PAPER),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.dpi": 130,
    "svg.fonttype": "none",
    "svg.hashsalt": "ssl-report",
    "text.parse_math": False,  # a setting may hold a dollar sign
}


def draw(
    runs: list[Run], table: pd.DataFrame, results: pd.DataFrame, keys: list[str]
) -> dict[str, tuple[str, bytes]]:
    """SVG and PNG of each plot that there is something for: `curves`, `keys`, `heat`. Keys come by their effect."""
    drawn = [key for key in keys if results[key].nunique() > 1]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a setting in letters that the font lacks
        figures = {"curves": curves(runs, table, keys)}
        if drawn:
            figures["keys"] = by_key(results, drawn[:PANELS])
        if len(drawn) > 1:
            figures["heat"] = heat(results, *drawn[:2])
        return {name: saved(figure) for name, figure in figures.items() if figure}


def saved(figure: Figure) -> tuple[str, bytes]:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    figure.savefig(png, format="png")
    return svg.getvalue(), png.getvalue()


def for_page(name: str, svg: str) -> str:
    """An SVG as an element of an HTML page, in the page's own ink and on its paper. Ids that it refers to get its name before
    them and the others go, so that the page has none twice."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    needed = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in needed else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def curves(runs: list[Run], table: pd.DataFrame, keys: list[str]) -> Figure | None:
    """Loss against the epoch, one panel a loss as their scales differ, and validation top-1 where it was probed on the way."""
    shown = table[table.status != "failed"].assign(setting=number_settings(table, keys))
    names = [runs[i].config.get("loss._target_", "").rpartition(".")[2] or "unknown" for i in shown.index]
    losses = {name: of_loss(runs, group) for name, group in shown.groupby(names, sort=False)}
    panels = {f"loss: {name}": curve for name, curve in losses.items() if len(curve)}
    probed = on_the_way(runs, shown)
    if len(probed):
        panels["validation top-1"] = probed
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.5, 4.2 * columns), 3.2 * rows + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours, labels = colour_of(shown, keys)
    for ax, (title, points) in zip(axes, panels.items(), strict=False):
        lines(ax, points, colours)
        ax.set(xlabel="epoch", title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title != "validation top-1" and wide(points.value):
            logarithmic(ax, "y")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in labels.items()]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=room(figure, list(labels)), fontsize=9
        )
    return figure


def of_loss(runs: list[Run], shown: pd.DataFrame) -> pd.DataFrame:
    """(setting, epoch, value) of the loss of some runs: some 200 epochs of each at most, the last one among them."""
    rows: list[tuple] = []
    for i, setting in zip(shown.index, shown.setting, strict=True):
        step = -(-len(runs[i].epochs) // 200) or 1
        rows += [
            (setting, *point) for point in zip(runs[i].epochs[::-step], runs[i].loss[::-step], strict=True)
        ]
    points = pd.DataFrame(rows, columns=["setting", "epoch", "value"])
    return points.astype(float).replace([np.inf, -np.inf], np.nan).dropna()


def on_the_way(runs: list[Run], shown: pd.DataFrame) -> pd.DataFrame:
    """(setting, epoch, value) of the first probe's validation top-1, of runs that were probed at several epochs."""
    rows: list[tuple] = []
    for i, setting in zip(shown.index, shown.setting, strict=True):
        val = [row for row in runs[i].probes if row.get("eval_split") == "val"]
        same = [row for row in val if all(row.get(key) == val[0].get(key) for key in ("features", "probe"))]
        if len({row.get("epoch") for row in same}) > 1:
            rows += [(setting, row.get("epoch"), row.get("top1")) for row in same]
    return (
        pd.DataFrame(rows, columns=["setting", "epoch", "value"])
        .apply(pd.to_numeric, errors="coerce")
        .dropna()
    )


def lines(ax: Axes, points: pd.DataFrame, colours: dict[Any, str]) -> None:
    """A line a setting, the mean over its runs, and with few settings a band from the lowest run to the highest."""
    settings = points.setting.unique()
    few, many = len(settings) <= FEW, len(settings) > 50
    for setting in settings:
        at = points[points.setting == setting].groupby("epoch").value.agg(["mean", "min", "max"])
        colour, marker = colours[setting], "." if len(at) < 4 else ""
        ax.plot(
            at.index,
            at["mean"],
            color=colour,
            marker=marker,
            lw=1.6 if few else 0.6 if many else 1,
            alpha=1 if few else 0.7,
            rasterized=many,
        )
        if few:
            ax.fill_between(at.index.to_numpy(float), at["min"], at["max"], alpha=0.15, lw=0, color=colour)


def colour_of(shown: pd.DataFrame, keys: list[str]) -> tuple[dict[Any, str], dict[str, str]]:
    """The colour of each setting, and what the legend calls each colour: the settings where they are few, else the values of the
    first key, many numbers in steps of a colour map from the smallest to the largest."""
    settings = shown.groupby("setting")[keys].first() if keys else shown.groupby("setting")[["path"]].first()
    if not keys:
        return dict.fromkeys(settings.index, COLOURS[0]), {}
    if len(settings) <= FEW:
        named = [
            ", ".join(f"{key}={value}" for key, value in row.items() if pd.notna(value))
            for _, row in settings.iterrows()
        ]
        labels = [short(name, 80) for name in named]
        colours = dict(zip(settings.index, COLOURS, strict=False))
        return colours, dict(zip(labels, colours.values(), strict=True))
    values = settings[keys[0]].fillna("-")
    order = sorted(values.unique(), key=float if is_numeric(values) else str)
    steps = matplotlib.colormaps["plasma"](
        np.linspace(0.3, 0.85, len(order))
    )  # what shows on white and on black
    colour = {
        value: to_hex(step)
        for value, step in zip(order, steps if len(order) > len(COLOURS) else COLOURS, strict=False)
    }
    named = [order[round(place)] for place in np.linspace(0, len(order) - 1, min(len(order), FEW))]
    return values.map(colour).to_dict(), {f"{keys[0]}={value}": colour[value] for value in named}


def room(figure: Figure, labels: list[str]) -> int:
    """How many labels a legend below the figure has room for side by side."""
    inches = 0.7 + 0.08 * max(map(len, labels))
    return max(1, min(len(labels), int(figure.get_figwidth() / inches)))


def by_key(results: pd.DataFrame, keys: list[str]) -> Figure:
    """Top-1 against each key, averaged over the others: points for numbers, bars for names, with 95 % intervals over seeds."""
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(max(5.5, 4.2 * columns), 3.2 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, key in zip(axes, keys, strict=False):
        table = over_seeds(results[results[key].notna()], key, list(SPLITS))
        (points if is_numeric(results[key]) else bars)(ax, table)
        ax.set(xlabel=key, ylabel="top-1")
    for ax in axes[len(keys) :]:
        ax.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def points(ax: Axes, table: pd.DataFrame) -> None:
    table = table.set_axis(table.index.astype(float)).sort_index()
    line = len(table) <= CELLS  # a random search has too many values for one
    for value, (name, marker, colour) in SPLITS.items():
        bar = table[f"± {value}"] if line else None
        style = {
            "color": colour,
            "ms": 5 if line else 3,
            "capsize": 3,
            "lw": 1.2,
            "ls": "-" if line else "",
            "alpha": 0.9,
        }
        ax.errorbar(table.index, table[value], bar, fmt=marker, label=name, **style)  # type: ignore[arg-type]
    if wide(table.index.to_series()):
        logarithmic(ax, "x")
    if len(table) <= 6:
        ax.set_xticks(table.index, [f"{x:g}" for x in table.index])
        ax.minorticks_off()


def bars(ax: Axes, table: pd.DataFrame) -> None:
    table = table.sort_index()
    x = np.arange(len(table))
    for shift, (value, (name, _, colour)) in zip((-0.2, 0.2), SPLITS.items(), strict=True):
        ax.bar(
            x + shift,
            table[value],
            0.36,
            yerr=table[f"± {value}"],
            color=colour,
            label=name,
            capsize=3,
            ecolor=INK,
        )
    crowded = len(table) > 4 or max(map(len, map(str, table.index))) > 10
    ax.set_xticks(
        x, [short(name) for name in table.index], rotation=30 * crowded, ha="right" if crowded else "center"
    )
    ax.grid(visible=False, axis="x")


def heat(results: pd.DataFrame, one: str, other: str) -> Figure:
    """Mean top-1 over two keys, on validation and on test; where they have too many values for cells, a point a setting."""
    some = results[results[one].notna() & results[other].notna()]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for ax, (value, (name, _, _)) in zip(figure.subplots(1, 2), SPLITS.items(), strict=True):
        few = max(some[one].nunique(), some[other].nunique()) <= CELLS
        drawn = (cells if few else scatter)(ax, some, other, one, value)
        ax.set(xlabel=other, ylabel=one, title=f"{name} top-1")
        bar = figure.colorbar(drawn, ax=ax)
        bar.outline.set_visible(False)
    return figure


def cells(ax: Axes, some: pd.DataFrame, x: str, y: str, value: str) -> matplotlib.cm.ScalarMappable:
    """A coloured cell for each pair of values, with its mean in it where there is room."""
    table = some.assign(**{value: some[value].astype(float)}).pivot_table(index=y, columns=x, values=value)
    table = table.loc[in_order(table.index), in_order(table.columns)]
    drawn = ax.pcolormesh(np.ma.masked_invalid(table.to_numpy()), cmap=MAP, edgecolors=PAPER, linewidth=1)
    ax.set_xticks(
        np.arange(table.shape[1]) + 0.5, map(short, table.columns), rotation=30 if table.shape[1] > 6 else 0
    )
    ax.set_yticks(np.arange(table.shape[0]) + 0.5, map(short, table.index))
    ax.grid(visible=False)
    means = table.to_numpy(float)
    for i, j in np.argwhere(np.isfinite(means)) if means.size <= 64 else []:
        dark = means[i, j] <= (np.nanmax(means) + np.nanmin(means)) / 2
        ax.text(
            j + 0.5,
            i + 0.5,
            f"{means[i, j]:.3f}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if dark else "black",
        )
    return drawn


def scatter(ax: Axes, some: pd.DataFrame, x: str, y: str, value: str) -> matplotlib.cm.ScalarMappable:
    """A coloured point for each setting."""
    table = some.groupby("setting").agg({x: "first", y: "first", value: "mean"})
    across, up = (
        pd.to_numeric(table[key]) if is_numeric(table[key]) else table[key].map(short) for key in (x, y)
    )
    drawn = ax.scatter(across, up, c=table[value].astype(float), cmap=MAP, s=14, rasterized=len(table) > 500)
    for axis, values in (("x", across), ("y", up)):
        if is_numeric(values) and wide(values.astype(float)):
            logarithmic(ax, axis)
    return drawn


def in_order(values: pd.Index) -> list[str]:
    return sorted(values, key=float if is_numeric(values.to_series()) else str)


def logarithmic(ax: Axes, name: str) -> None:
    """Makes the axis x or y logarithmic, its numbers plain text."""
    (ax.set_xscale if name == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if name == "x" else ax.yaxis
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def wide(values: pd.Series) -> bool:
    """Whether values are better shown on a logarithmic axis: all positive, the largest 30 times the smallest."""
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def short(value: object, longest: int = 24) -> str:
    text = str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
