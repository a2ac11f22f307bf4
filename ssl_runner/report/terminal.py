"""The summary that `ssl-report` prints."""

import re
import shutil

import pandas as pd

from ssl_runner.report.label_free import MIN_CONFIGURATIONS, Correlations
from ssl_runner.report.read import Run
from ssl_runner.report.tables import (
    MAIN,
    count_by_status,
    count_runs,
    errors,
    scored,
    top1_columns,
    with_interval,
)

TITLES = {"val_top1": "val top-1", "top1": "test top-1"}
MAX_LINES = 30  # configurations
MAX_PROBLEMS = 10
MAX_OTHERS = 4  # results of other data sets, where no run has one of its own


def format_terminal(
    runs: list[Run], table: pd.DataFrame, summary: pd.DataFrame, keys: list[str], correlations: Correlations
) -> str:
    """Counts, the best configurations, correlations of label-free measures and the most frequent errors.

    The lines fit the terminal. Lines that name damaged files are not cut off.
    """
    width = shutil.get_terminal_size((160, 24)).columns
    lines = [f"{count_runs(len(table))}: {count_by_status(table)}"]
    if len(summary):
        lines.append("sorted by validation accuracy; mean ± 95 % confidence interval over n seeds")
        lines += format_results(summary.head(MAX_LINES), keys)
        if summary[list(MAIN)].isna().all(axis=None):
            lines.append(f"the first {MAX_OTHERS} results of ssl-probe on other images; runs.csv has all")
    if len(summary) > MAX_LINES:
        lines.append(f"and {len(summary) - MAX_LINES} more configurations, in report.html")
    measures, notes = correlations
    if len(measures) and measures.n.max() > 1:
        lines.append("Spearman's rank correlation of label-free measures with top-1 over n configurations")
        if measures.n.max() >= MIN_CONFIGURATIONS:
            lines += align({name: list(map(format_cell, measures[name])) for name in map(str, measures)})
        lines += notes
    if unscored := int((table.status == "done").sum()) - len(scored(table)):
        lines.append(f"no top-1 for {unscored} done: their images have no labels; runs.csv has the losses")
    for error, paths in errors(table)[:3]:
        lines.append(f"failed ({len(paths)}): {error} [{paths[0]}]")
    lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    problems = [problem for run in runs for problem in run.problems]
    lines += problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more damaged files, in report.html")
    return "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", line) for line in lines)


def format_results(summary: pd.DataFrame, keys: list[str]) -> list[str]:
    """Results first, so that a narrow terminal cuts off the keys with the smallest effect.

    If no run has a result on its own data set, the first ones of `ssl-probe` on other data sets are shown.
    """
    main = list(MAIN)
    if summary[main].isna().all(axis=None):
        main = [column for column in top1_columns(summary) if column not in MAIN][:MAX_OTHERS]
    columns: dict[str, list[str]] = {
        **{
            TITLES.get(name) or " ".join(name.split(".", 2)[1:]): list(
                map(with_interval, summary[name], summary[f"± {name}"])
            )
            for name in main
        },
        "n": list(map(str, summary.n)),
        **{key: list(summary[key].fillna("-")) for key in keys},
    }
    return align(columns)


def format_cell(value: object) -> str:
    """A correlation with two decimals, - for none; anything else as text."""
    return ("-" if value != value else f"{value:.2f}") if isinstance(value, float) else str(value)


def align(columns: dict[str, list[str]]) -> list[str]:
    """Lines of a table: the header and the rows of its columns."""
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]
