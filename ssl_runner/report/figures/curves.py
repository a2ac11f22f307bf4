"""Training curves: loss and validation top-1 against the epoch, one row of panels per loss."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import number_configurations
from ssl_runner.report.figures.style import (
    COLOURS,
    INK,
    LARGEST,
    WIDTH,
    Picture,
    distinct,
    distinguishing,
    in_order,
    label,
    limit_to_accuracies,
    palette,
    set_log_scale,
    shorten,
    spans_decades,
    wrapped,
)
from ssl_runner.report.read import Run
from ssl_runner.report.tables import own_probes

MAX_NAMED = 10  # lines of a row with a legend entry each
MAX_BANDS = 6  # lines of a row with a band each
DASHES = ("-", "--", ":", "-.")
MARKERS = ("", "o", "s", "^", "v", "D")


def curves(part: Comparison) -> Picture | None:
    """Mean over the runs of a configuration. Losses have rows of their own; all epoch axes are equal."""
    shown = part.table.assign(configuration=number_configurations(part.table, part.keys))
    rows = {}
    for method, group in shown.groupby("method"):
        loss, top1 = points(group, loss_points, part.runs), points(group, probe_points, part.runs)
        if len(loss) or len(top1):
            rows[str(method)] = group, loss, top1.assign(value=100 * top1.value)
    if not rows:
        return None
    probed = any(len(top1) for _, _, top1 in rows.values())
    styles = [line_styles(group, distinguishing(group, part.keys)) for group, _, _ in rows.values()]
    columns = 1 + probed + any(handles for _, handles, _ in styles)
    heights = [max(3, 0.17 * lines_of(heading, handles)) for _, handles, heading in styles]
    figure = Figure(figsize=(max(5.5, WIDTH * columns / 3), sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for column, titles in enumerate(
        (("loss", "loss"), ("validation top-1", "validation top-1 (%)"))[: 1 + probed]
    ):
        draw_column(list(axes[:, column]), rows, column, titles, [style for style, _, _ in styles])
    for ax, (_, handles, heading) in zip(axes[:, 1 + probed :].flat, styles, strict=False):
        ax.set_axis_off()
        legend = ax.legend(handles=handles, title=heading, loc="center left", alignment="left")
        legend.set_in_layout(False)
    return Picture(figure)


def lines_of(heading: str, handles: list[Line2D]) -> int:
    """The number of lines of a legend."""
    return len("\n".join([heading, *(str(handle.get_label()) for handle in handles)]).splitlines())


def draw_column(
    axes: Sequence[Axes], rows: dict[str, tuple], column: int, titles: tuple[str, str], styles: list[dict]
) -> None:
    """The losses (column 0) or validation top-1 (column 1) of all rows, which share the epoch axis.

    Accuracies share their axis as well.
    """
    for ax in axes[1:]:
        ax.sharex(axes[0])
        if column:
            ax.sharey(axes[0])
    for ax, (method, (_, *contents)), style in zip(axes, rows.items(), styles, strict=True):
        draw_lines(ax, contents[column], style)
        ax.set(xlabel="epoch", ylabel=titles[1], title=f"{method}: {titles[0]}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not column and len(contents[0]) and spans_decades(contents[0].value):
            set_log_scale(ax, "y")
    if column:
        limit_to_accuracies(axes)


def points(shown: pd.DataFrame, of_run: Callable[[Run], list[tuple]], runs: dict[int, Run]) -> pd.DataFrame:
    """(configuration, epoch, value) of all finite points of some runs."""
    numbered = zip(map(int, shown.index), shown.configuration, strict=True)
    rows = [(configuration, *point) for row, configuration in numbered for point in of_run(runs[row])]
    table = pd.DataFrame(rows, columns=["configuration", "epoch", "value"])
    table = table.apply(pd.to_numeric, errors="coerce").astype(float)
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


def line_styles(shown: pd.DataFrame, keys: list[str]) -> tuple[dict[Any, Any], list[Line2D], str]:
    """Configuration -> style of its line, legend entries, and the heading of the legend.

    Up to MAX_NAMED lines differ in colour, the value of the first key, and in dashes or markers, and have
    names. Of more lines, the legend has the colours, and names the options that they do not show.
    """
    configurations = in_order(shown.groupby("configuration")[keys].first(), keys)
    if not keys:
        return {number: {"color": COLOURS[0]} for number in configurations.index}, [], ""
    first = configurations[keys[0]].fillna("-")
    values = distinct(first)
    colours = dict(zip(values, palette(len(values)), strict=True))
    styles: dict[Any, Any] = {number: {"color": colours[value]} for number, value in first.items()}
    if len(configurations) > MAX_NAMED:
        some = values if len(values) <= MAX_NAMED else values[:: -(-len(values) // MAX_NAMED)]
        rest = f" (lines of one colour differ in {', '.join(keys[1:])})" if keys[1:] else ""
        handles = [Line2D([], [], color=colours[value], label=shorten(value)) for value in some]
        return styles, handles, wrapped(f"{keys[0]}{rest}")
    for number, nth in first.groupby(first).cumcount().items():
        styles[number] |= {"ls": DASHES[nth % 4], "marker": MARKERS[nth // 4]}
    rows = zip(configurations.index, configurations.to_dict("records"), strict=True)
    return styles, [Line2D([], [], label=label(row), **styles[number]) for number, row in rows], ""


def draw_lines(ax: Axes, values: pd.DataFrame, styles: dict[Any, Any]) -> None:
    """One line per configuration, and for few a band from the lowest to the highest run."""
    groups = values.groupby("configuration")
    few, many = len(groups) <= MAX_BANDS, len(groups) > 50
    for number, group in groups:
        at = group.groupby("epoch").value.agg(["mean", "min", "max"])
        style: Any = {"lw": 1.5 if few else 0.6 if many else 1.2, "alpha": 0.6 if many else 0.9, "ms": 4}
        style |= styles[number] | {"rasterized": many}
        if len(at) == 1:
            style |= {"marker": style.get("marker") or "."}
        ax.plot(at.index, at["mean"], **style)
        if few:
            ax.fill_between(
                at.index.to_numpy(float), at["min"], at["max"], alpha=0.15, lw=0, color=style["color"]
            )
    if not len(groups):
        ax.text(0.5, 0.5, "not recorded", color=INK, ha="center", transform=ax.transAxes)
