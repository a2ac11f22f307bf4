"""Top-1 against each option that differs between runs, for each loss by itself."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import is_numeric, over_seeds
from ssl_runner.report.figures.style import (
    SPLITS,
    Picture,
    distinct,
    limit_to_accuracies,
    panels,
    set_log_scale,
    shorten,
    spans_decades,
    splits_of,
    varying,
)

MAX_PANELS = 12
MAX_MEANS = 30  # values of an option up to which means have intervals and lines


def by_option(part: Comparison) -> Picture | None:
    """Means over the configurations with a value, with 95 % intervals or, below three seeds, each seed."""
    results = part.results[part.results[list(SPLITS)].notna().any(axis=1)]
    methods = distinct(results.method)
    contents = [("", "method", results)] if len(methods) > 1 else []
    for method in methods:
        of_one = results[results.method == method]
        name = f"{method}: " if len(methods) > 1 else ""
        contents += [(name, key, of_one) for key in varying(of_one, part.keys)]
    if not contents:
        return None
    figure, axes = panels(len(contents[:MAX_PANELS]), extra=0.4)
    for ax, (name, key, some) in zip(axes, contents, strict=False):
        draw_means(ax, some[some[key].notna()], key, varying(some, [k for k in part.keys if k != key]))
        axis = "loss" if key == "method" else key
        ax.set(xlabel=axis, ylabel="top-1 (%)", title=f"{name}{axis}")
    limit_to_accuracies(axes)
    found = [ax.get_legend_handles_labels() for ax in axes]
    handles, labels = max(found, key=lambda one: len(one[1]))
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
    left_out = [f"{name}{key}" for name, key, _ in contents[MAX_PANELS:]]
    return Picture(figure, [f"Not drawn: {', '.join(left_out)}."] if left_out else [])


def draw_means(ax: Axes, results: pd.DataFrame, key: str, others: list[str]) -> None:
    """Numbers are positions on the axis, names are in order. `others` are the other options that vary."""
    table = over_seeds(results, key, list(SPLITS))
    numeric, values = is_numeric(results[key]), distinct(results[key])
    at = pd.Series([float(value) for value in values] if numeric else range(len(values)), values, dtype=float)
    few = len(values) <= MAX_MEANS
    shift = 0 if numeric else 0.08
    joined = comparable(results, key, others) if numeric and few else []
    for sign, (split, (name, marker, colour)) in zip((-1, 1), splits_of(results).items(), strict=False):
        mean, half = 100 * table[split][values], 100 * table[f"± {split}"][values]
        single = results[results[key].map(half).isna()] if few else results[:0]
        ax.scatter(
            single[key].map(at).astype(float) + sign * shift,
            100 * single[split],
            s=16,
            color=colour,
            alpha=0.5,
            lw=0,
        )
        limits = np.stack([mean - (mean - half).clip(lower=0), (mean + half).clip(upper=100) - mean])
        style: Any = {"ms": 5 if few else 3, "ls": "", "lw": 1.2, "capsize": 3}
        ax.errorbar(
            at + sign * shift, mean, limits if few else None, fmt=marker, label=name, color=colour, **style
        )
        ax.plot(at[joined], mean[joined], color=colour, lw=1.2)
    if numeric and spans_decades(at, factor=9):
        set_log_scale(ax, "x")
    if not numeric:
        crowded = len(values) > 4 or max(map(len, map(str, values))) > 10
        names = [shorten(value) for value in values]
        ax.set_xticks(at, names, rotation=30 * crowded, ha="right" if crowded else "center")
        ax.set_xlim(-0.5, len(values) - 0.5)
    elif len(values) <= 6:
        ax.set_xticks(at, [f"{x:g}" for x in at])
        ax.minorticks_off()


def comparable(results: pd.DataFrame, key: str, others: list[str]) -> list[Any]:
    """The values of a key, in order, at which the other options have the same settings.

    These are the settings that most values have.
    """
    settings = results[others].fillna("").apply(tuple, axis=1) if others else pd.Series("", results.index)
    of_value = settings.groupby(results[key]).agg(frozenset)
    return [value for value in distinct(results[key]) if of_value[value] == of_value.mode()[0]]
