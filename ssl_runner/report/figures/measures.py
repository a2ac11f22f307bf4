"""What the embeddings are like, against the accuracy: rank, alignment, loss gap and label energy; spectra."""

from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import MEASURES
from ssl_runner.report.figures.style import (
    COLOURS,
    INK,
    LARGEST,
    MIN_FONT,
    Picture,
    distinct,
    distinguishing,
    label,
    limit_to_accuracies,
    palette,
    panels,
    set_log_scale,
    spans_decades,
    splits_of,
)
from ssl_runner.report.read import read_spectrum

MARKERS = "osD^vP"
MAX_SPECTRA = 6  # configurations


def measures(part: Comparison) -> Picture | None:
    """Top-1 against each of MEASURES, one point per configuration; a loss gap has a panel per loss."""
    summary = part.summary
    splits = splits_of(summary)
    if not splits:
        return None
    split = "top1" if "top1" in splits else "val_top1"
    methods = distinct(summary.method)
    contents = []
    for column, name in MEASURES.items():
        if column not in summary:
            continue
        values = summary[(summary[column].abs() < LARGEST) & summary[split].notna()]
        groups = [values[values.method == one] for one in methods] if "gap" in column else [values]
        contents += [(column, name, group) for group in groups if len(group) > 1]
    if not contents:
        return None
    figure, axes = panels(len(contents), extra=0.4)
    styles = dict(
        zip(methods, zip(palette(len(methods)), len(methods) * MARKERS, strict=False), strict=False)
    )
    for ax, (column, name, values) in zip(axes, contents, strict=True):
        for method, group in values.groupby("method"):
            colour, marker = styles[method]
            ax.scatter(group[column], 100 * group[split], s=34, color=colour, marker=marker, alpha=0.8, lw=0)
        suffix = f" of {values.method.iloc[0]}" if "gap" in column else ""
        ax.set(xlabel=name, ylabel=f"{splits[split][0]} top-1 (%)", title=f"{name.split(' (')[0]}{suffix}")
        if spans_decades(values[column]):
            set_log_scale(ax, "x")
    limit_to_accuracies(axes)
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", label=method)
        for method, (colour, marker) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=6)
    return Picture(figure)


def spectra(part: Comparison) -> Picture | None:
    """Singular values of Z of each seed and those of the closed form, for the best configurations.

    The best of each loss comes first, then the second best, and so on.
    """
    contents: dict[int, list[np.ndarray]] = {}
    order = part.summary.groupby("method").cumcount().sort_values(kind="stable").index
    for row in map(int, order):
        if len(contents) == MAX_SPECTRA:
            break
        members: Any = part.summary.at[row, "rows"]
        found = [read_spectrum(part.runs[run]) for run in members]
        found = [spectrum for spectrum in found if len(spectrum) and (abs(spectrum[:, :2]) < LARGEST).all()]
        if found:
            contents[row] = found
    if not contents:
        return None
    figure, axes = panels(len(contents), extra=0.4, sharex=True)
    shown = part.summary.loc[list(contents)]
    keys = distinguishing(shown, part.names)
    for ax, (row, found) in zip(axes, contents.items(), strict=True):
        for k, Z, closed_form in (spectrum.T for spectrum in found):
            ax.plot(k, Z, color=COLOURS[0], marker=".", ms=4, lw=1, alpha=0.7)
            ax.plot(k, closed_form, color=INK, ls="--", lw=1)
        ax.set_title(label(shown[keys].loc[row].to_dict()), fontsize=MIN_FONT)
        ax.set(xlabel="direction k", ylabel="singular value / √N")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylim(bottom=0)
    handles = [
        Line2D([], [], color=COLOURS[0], marker=".", label="Z, one line per seed"),
        Line2D([], [], color=INK, ls="--", label="closed form"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    note = f"{len(contents)} of {len(part.summary)} configurations, the best of each loss first."
    return Picture(figure, [note] if len(contents) < len(part.summary) else [])
