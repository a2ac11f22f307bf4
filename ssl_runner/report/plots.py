"""The plots of `ssl-report`: training curves, top-1 against each swept key, and a heat map over two keys."""

import io
import warnings
from collections.abc import Callable
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
from ssl_runner.report.tables import MAIN, binned, is_numeric, number_configurations, over_seeds, own_probes

COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
]  # Okabe and Ito: safe for the colour-blind
INK, PAPER = "#1b1b1c", "#fefeff"
MAX_LABELLED = 6  # curves with a legend entry each
MAX_PANELS = 12  # keys with a panel each
MAX_CELLS = 12  # values of a key in the heat map; more numbers are binned
LARGEST = 1e100  # larger numbers, which no run writes, overflow in a plot
MAX_JOINED = 30  # values of a key up to which points are joined by a line
NAMES = ("curves", "keys", "heat")
FILES = tuple(f"{name}.{kind}" for name in NAMES for kind in ("svg", "png"))
SPLITS = {"val_top1": ("validation", "o", COLOURS[1]), "top1": ("test", "s", COLOURS[0])}
STYLE: Any = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
    **dict.fromkeys(["figure.facecolor", "savefig.facecolor"], PAPER),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "svg.fonttype": "none",
    "svg.hashsalt": "ssl-report",
    "text.parse_math": False,  # the value of an option may contain a dollar sign
}


def draw(runs: list[Run], table: pd.DataFrame, results: pd.DataFrame, keys: list[str]) -> dict[str, bytes]:
    """File name -> content of each plot that has data. `keys` are sorted by their effect."""
    results = results[results[list(MAIN)].notna().any(axis=1)]
    drawn = [key for key in keys if results[key].nunique() > 1]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # values in letters that the font lacks
        figures = {"curves": curves(runs, table, keys)}
        if drawn:
            figures["keys"] = by_key(results, drawn[:MAX_PANELS])
        if len(drawn) > 1:
            figures["heat"] = heat(results, *drawn[:2])
        files = {}
        for name, figure in figures.items():
            for kind in ("svg", "png") if figure else ():
                content = io.BytesIO()
                metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"]) if kind == "svg" else None
                figure.savefig(content, format=kind, metadata=metadata)  # type: ignore[union-attr]
                files[f"{name}.{kind}"] = content.getvalue()
        return files


def splits_of(results: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """SPLITS without those that no run was scored on: runs without test images have no test top-1."""
    return {value: style for value, style in SPLITS.items() if results[value].notna().any()}


def panels(number: int, extra: float) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels in up to three columns, `extra` inches taller for a legend below."""
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(max(5.5, 4.2 * columns), 3.2 * rows + extra), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[number:]:
        ax.set_visible(False)
    return figure, axes


def curves(runs: list[Run], table: pd.DataFrame, keys: list[str]) -> Figure | None:
    """Loss against epoch, one panel per kind of loss, and validation top-1 if `probe.every` was set."""
    shown = table[table.status != "failed"].assign(configuration=number_configurations(table, keys))
    names = [runs[i].config.get("loss._target_", "").rpartition(".")[2] or "unknown" for i in shown.index]
    content = {
        f"loss: {name}": points(group, loss_points, runs) for name, group in shown.groupby(names, sort=False)
    }
    content["validation top-1"] = points(shown, probe_points, runs)
    content = {title: table for title, table in content.items() if len(table)}
    if not content:
        return None
    figure, axes = panels(len(content), 0.8)
    colours, labels = curve_colours(shown, keys)
    for ax, (title, values) in zip(axes, content.items(), strict=False):
        draw_lines(ax, values, colours)
        ax.set(xlabel="epoch", title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title != "validation top-1" and spans_decades(values.value):
            set_log_scale(ax, "y")
    if labels:
        handles = [Line2D([], [], color=colour, label=name) for name, colour in labels.items()]
        columns = int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, labels))))  # that fit side by side
        columns = max(1, min(len(labels), columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def points(shown: pd.DataFrame, of_run: Callable[[Run], list[tuple]], runs: list[Run]) -> pd.DataFrame:
    """(configuration, epoch, value) of all finite points of some runs."""
    numbered = zip(shown.index, shown.configuration, strict=True)
    rows = [(configuration, *point) for i, configuration in numbered for point in of_run(runs[i])]
    table = pd.DataFrame(rows, columns=["configuration", "epoch", "value"]).apply(
        pd.to_numeric, errors="coerce"
    )
    table = table.astype(float)
    return table[(table.abs() < LARGEST).all(axis=1)]


def loss_points(run: Run) -> list[tuple]:
    """(epoch, loss) of at most about 200 epochs, the last one included."""
    step = -(-len(run.epochs) // 200) or 1
    return list(zip(run.epochs[::-step], run.loss[::-step], strict=True))


def probe_points(run: Run) -> list[tuple]:
    """(epoch, validation top-1) of the first probe, for a run that was probed at several epochs."""
    val = [row for row in own_probes(run) if row.get("eval_split") == "val"]
    same = [row for row in val if all(row.get(key) == val[0].get(key) for key in ("features", "probe"))]
    several = len({row.get("epoch") for row in same}) > 1
    return [(row.get("epoch"), row.get("top1")) for row in same] if several else []


def draw_lines(ax: Axes, values: pd.DataFrame, colours: dict[Any, str]) -> None:
    """One line per configuration, the mean over its runs.

    For few configurations, a band spans the lowest to the highest run.
    """
    configurations = values.configuration.unique()
    few, many = len(configurations) <= MAX_LABELLED, len(configurations) > 50
    style: Any = {"lw": 1.6 if few else 0.6 if many else 1, "alpha": 1 if few else 0.7, "rasterized": many}
    for configuration in configurations:
        at = values[values.configuration == configuration].groupby("epoch").value.agg(["mean", "min", "max"])
        colour, marker = colours[configuration], "." if len(at) < 4 else ""
        ax.plot(at.index, at["mean"], color=colour, marker=marker, **style)
        if few:
            ax.fill_between(at.index.to_numpy(float), at["min"], at["max"], alpha=0.15, lw=0, color=colour)


def curve_colours(shown: pd.DataFrame, keys: list[str]) -> tuple[dict[Any, str], dict[str, str]]:
    """Configuration -> colour, and legend label -> colour.

    Up to MAX_LABELLED configurations have a colour each. Otherwise colours show the values of the first key,
    from a colour map.
    """
    groups = shown.groupby("configuration")
    if not keys:
        return dict.fromkeys(groups.groups, COLOURS[0]), {}
    configurations = groups[keys].first()
    if len(configurations) <= MAX_LABELLED:
        rows = configurations.to_dict("records")
        names = [", ".join(f"{key}={value}" for key, value in row.items() if pd.notna(value)) for row in rows]
        return (
            dict(zip(configurations.index, COLOURS, strict=False)),
            dict(zip([shorten(name, 80) for name in names], COLOURS, strict=False)),
        )
    values = configurations[keys[0]].fillna("-")
    order = in_order(values)
    steps = matplotlib.colormaps["plasma"](np.linspace(0.3, 0.85, len(order)))
    palette = COLOURS if len(order) <= len(COLOURS) else [to_hex(step) for step in steps]
    colour = dict(zip(order, palette, strict=False))
    named = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(len(order), MAX_LABELLED))]
    return values.map(colour).to_dict(), {f"{keys[0]}={value}": colour[value] for value in named}


def by_key(results: pd.DataFrame, keys: list[str]) -> Figure:
    """Top-1 against each key, averaged over the others, with 95 % intervals.

    Numbers are drawn as points, names as bars.
    """
    figure, axes = panels(len(keys), 0.5)
    for ax, key in zip(axes, keys, strict=False):
        table = over_seeds(results[results[key].notna()], key, list(SPLITS))
        (draw_points if is_numeric(results[key]) else draw_bars)(ax, table)
        ax.set(xlabel=key, ylabel="top-1")
    found = [ax.get_legend_handles_labels() for ax in axes]
    handles, labels = max(found, key=lambda one: len(one[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def draw_points(ax: Axes, table: pd.DataFrame) -> None:
    table = table.set_axis(table.index.astype(float)).sort_index()
    joined = len(table) <= MAX_JOINED
    style: Any = {
        "ms": 5 if joined else 3,
        "ls": "-" if joined else "",
        "capsize": 3,
        "lw": 1.2,
        "alpha": 0.9,
    }
    for value, (name, marker, colour) in splits_of(table).items():
        half_width = table[f"± {value}"] if joined else None
        ax.errorbar(table.index, table[value], half_width, fmt=marker, label=name, color=colour, **style)
    if spans_decades(table.index.to_series()):
        set_log_scale(ax, "x")
    if len(table) <= 6:
        ax.set_xticks(table.index, [f"{x:g}" for x in table.index])
        ax.minorticks_off()


def draw_bars(ax: Axes, table: pd.DataFrame) -> None:
    table = table.sort_index()
    x = np.arange(len(table))
    splits = splits_of(table)
    shifts = (-0.2, 0.2) if len(splits) > 1 else (0.0,)
    for shift, (value, (name, _, colour)) in zip(shifts, splits.items(), strict=False):
        style: Any = {
            "yerr": table[f"± {value}"],
            "color": colour,
            "label": name,
            "capsize": 3,
            "ecolor": INK,
        }
        ax.bar(x + shift, table[value], 0.36, **style)
    crowded = len(table) > 4 or max(map(len, map(str, table.index))) > 10
    names = [shorten(name) for name in table.index]
    ax.set_xticks(x, names, rotation=30 * crowded, ha="right" if crowded else "center")
    ax.grid(visible=False, axis="x")


def heat(results: pd.DataFrame, one: str, other: str) -> Figure:
    """Mean top-1 over two keys, on validation and, if there are test images, on test.

    Keys with many numbers are binned at their quantiles.
    """
    some = results[results[one].notna() & results[other].notna()].copy()
    orders = {}
    for key in (one, other):
        bins = binned(some[key], MAX_CELLS // 2, MAX_CELLS)
        labels = bins.map(
            lambda bin: f"{bin.left:.6g}..{bin.right:.6g}" if isinstance(bin, pd.Interval) else bin
        )
        orders[key] = in_order(some[key], labels)
        some[key] = labels
    splits = splits_of(results)
    figure = Figure(figsize=(5.5 * len(splits), 4.4), layout="constrained")
    axes = figure.subplots(1, len(splits), squeeze=False).flat
    for ax, (value, (name, _, _)) in zip(axes, splits.items(), strict=True):
        table = some.astype({value: float}).pivot_table(index=one, columns=other, values=value)
        table = table.reindex(index=orders[one], columns=orders[other])
        means = np.ma.masked_invalid(table.to_numpy(float))
        mesh = ax.pcolormesh(means, cmap="viridis", edgecolors=PAPER, linewidth=1)
        ax.set(xlabel=other, ylabel=one, title=f"{name} top-1")
        rotation = 30 if table.shape[1] > 6 else 0
        ax.set_xticks(np.arange(table.shape[1]) + 0.5, map(shorten, table.columns), rotation=rotation)
        ax.set_yticks(np.arange(table.shape[0]) + 0.5, map(shorten, table.index))
        ax.grid(visible=False)
        for i, j in np.argwhere(~means.mask) if means.size <= 64 else []:
            colour = "white" if means[i, j] <= (means.max() + means.min()) / 2 else "black"
            text = f"{means[i, j]:.3f}"
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=9, color=colour)
        figure.colorbar(mesh, ax=ax).outline.set_visible(False)
    return figure


def in_order(values: pd.Series, labels: pd.Series | None = None) -> list[str]:
    """The distinct values in ascending order, numbers by size; or their labels in this order."""
    table = pd.DataFrame({"value": values, "label": values if labels is None else labels})
    numeric = is_numeric(values)
    table = table.sort_values("value", key=pd.to_numeric if numeric else None, kind="stable")
    return list(dict.fromkeys(table.label))


def set_log_scale(ax: Axes, name: str) -> None:
    """Logarithmic axis x or y with plain numbers."""
    (ax.set_xscale if name == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if name == "x" else ax.yaxis
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def spans_decades(values: pd.Series) -> bool:
    """Whether values suit a logarithmic axis: all positive, the largest over 30 times the smallest."""
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def shorten(value: object, longest: int = 24) -> str:
    text = str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
