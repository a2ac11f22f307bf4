"""The summary that `ssl-report` prints."""

import re
import shutil

import pandas as pd

from ssl_runner.errors import counted
from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import MIN_SEEDS, with_interval
from ssl_runner.report.label_free import MIN_CONFIGURATIONS, Correlations
from ssl_runner.report.read import Run
from ssl_runner.report.tables import MAIN, count_by_status, errors, scored, top1_columns

TITLES = {"val_top1": "val top-1", "top1": "test top-1"}
MAX_COMPARISONS = 10
MAX_LINES = 30  # configurations of each
MAX_PROBLEMS = 10
MAX_OTHERS = 4  # results of other data sets, where no run has one of its own


def format_terminal(
    runs: list[Run], table: pd.DataFrame, comparisons: list[Comparison], correlations: Correlations
) -> str:
    """Counts, the best configurations of each comparison, rank correlations and the most frequent errors.

    The lines fit the terminal. Lines that name damaged files are not cut off.
    """
    width = shutil.get_terminal_size((160, 24)).columns
    lines = [f"{counted(len(table), 'run')}: {count_by_status(table)}"]
    finished = [part for part in comparisons if len(part.summary)]
    if finished:
        lines.append(
            "sorted by validation accuracy; mean over n seeds, with the 95 % confidence interval for"
            f" n >= {MIN_SEEDS}"
        )
    for part in finished[:MAX_COMPARISONS]:
        lines += format_comparison(part, with_title=len(finished) > 1)
    if len(finished) > MAX_COMPARISONS:
        lines.append(f"and {len(finished) - MAX_COMPARISONS} more data sets or protocols, in report.html")
    measures, notes = correlations
    if len(measures) and measures.n.max() > 1:
        lines.append("Spearman's rank correlation of label-free measures with top-1 over n configurations")
        if measures.n.max() >= MIN_CONFIGURATIONS:
            lines += align({name: list(map(format_cell, measures[name])) for name in map(str, measures)})
        lines += notes
    unscored = [runs[row] for row in table.index[table.status == "done"].difference(scored(table).index)]
    if unlabelled := sum(not run.record.get("classes") for run in unscored):
        lines.append(f"no top-1 for {unlabelled} done: their images have no labels; runs.csv has the losses")
    if lost := len(unscored) - unlabelled:
        lines.append(f"no top-1 for {lost} done: their run.json and probe.csv have none that is valid")
    for error, rows in errors(table)[:3]:
        lines.append(f"failed ({len(rows)}): {error} [{table.path[rows[0]]}]")
    lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    problems = [problem for run in runs for problem in run.problems]
    lines += problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more damaged files, in report.html")
    return "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", line) for line in lines)


def format_comparison(part: Comparison, with_title: bool) -> list[str]:
    """The title and the best configurations.

    Results come first, so that a narrow terminal cuts off the keys with the smallest effect. If no run has a
    result on its own data set, the first ones of `ssl-probe` on other data sets are shown.
    """
    main, best = list(MAIN), part.summary.head(MAX_LINES)
    lines = [part.title] if with_title else []
    other = part.summary[main].isna().all(axis=None)
    if other:
        main = [column for column in top1_columns(best) if column not in MAIN][:MAX_OTHERS]
    columns: dict[str, list[str]] = {
        **{
            TITLES.get(name) or " ".join(name.split(".", 2)[1:]): list(
                map(with_interval, best[name], best[f"± {name}"])
            )
            for name in main
        },
        "n": list(map(str, best.n)),
        **{"loss" if key == "method" else key: list(best[key].fillna("-")) for key in part.names},
    }
    lines += align(columns)
    if other:
        lines.append(f"the first {MAX_OTHERS} results of ssl-probe on other images; runs.csv has all")
    if len(part.summary) > MAX_LINES:
        lines.append(f"and {len(part.summary) - MAX_LINES} more configurations, in report.html")
    return lines


def format_cell(value: object) -> str:
    """A correlation with two decimals, - for none; anything else as text."""
    return ("-" if value != value else f"{value:.2f}") if isinstance(value, float) else str(value)


def align(columns: dict[str, list[str]]) -> list[str]:
    """Lines of a table: the header and the rows of its columns."""
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]
