"""The HTML page of `ssl-report`: self-contained, nothing is fetched, and nothing that a run says is taken for markup."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ssl_runner import __version__
from ssl_runner.report.plots import for_page
from ssl_runner.report.read import Run
from ssl_runner.report.tables import count_by_status, errors, one_line, with_interval

CAPTIONS = {
    "curves": "Training curves: the mean over the runs of a setting; with few settings, the band goes from its lowest run to its "
    "highest. Failed runs are left out. Losses of different settings may be on different scales.",
    "keys": "Top-1 against each key that differs among the runs: the mean over the settings that share a value, with its 95 % "
    "interval over seeds, where the settings' variances are pooled. Keys come in the order of their effect on validation top-1.",
    "heat": "Mean top-1 over the two keys with the largest effect on validation top-1, averaged over the other keys and seeds.",
}
Cell = tuple[str, float | str]  # what is shown, and what it is sorted by
SHOWN_ERRORS = 50


def render(
    title: str,
    runs: list[Run],
    table: pd.DataFrame,
    summary: pd.DataFrame,
    keys: list[str],
    pictures: dict[str, str],
) -> str:
    """The page. Every table is a header and rows of cells."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    overridden = [
        key for key in table.columns[3 : table.columns.get_loc("top1")] if key not in ("seed", *keys)
    ]
    tracebacks = {one_line(run.record.get("error")): run.record.get("traceback") for run in reversed(runs)}
    found = [(error, paths, tracebacks.get(error)) for error, paths in errors(table)]
    return environment.get_template("report.html").render(
        title=title,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        statuses=count_by_status(table),
        total=len(table),
        shared={key: table[key].dropna().iloc[0] for key in overridden if table[key].nunique() == 1},
        summary=summary_table(summary, keys),
        runs=one_row_a_run(table, keys),
        pictures=[(CAPTIONS[name], Markup(for_page(name, svg))) for name, svg in pictures.items()],
        errors=found[:SHOWN_ERRORS],
        more_errors=len(found) - SHOWN_ERRORS,
        protocols=protocols(table),
    )


def summary_table(summary: pd.DataFrame, keys: list[str]) -> tuple[list[str], list[list[Cell]]]:
    """A row a setting: the main result, the keys, then every other probe."""
    means = [str(column) for column in summary if f"± {column}" in summary]
    main = [column for column in ("val_top1", "top1") if column in means]
    others = [column for column in means if column not in main]
    rows = [
        [top1(row, c) for c in main]
        + [text(row["n"])]
        + [text(row[key]) for key in keys]
        + [top1(row, c) for c in others]
        for row in summary.to_dict("records")
    ]
    names = {"val_top1": "validation top-1", "top1": "test top-1"}
    other_names = [" ".join(column.split(".")[1:]) for column in others]
    return [*(names[column] for column in main), "n", *keys, *other_names], rows


def one_row_a_run(table: pd.DataFrame, keys: list[str]) -> tuple[list[str], list[list[Cell]]]:
    """A row a run, with what one looks for first; runs.csv has the rest."""
    names = {"status": "status", "val_top1": "validation top-1", "top1": "test top-1"}
    names |= {key: key for key in [*keys, "seed"]}
    names |= {
        "metrics.loss": "loss",
        "epochs_done": "epochs done",
        "epochs_asked": "of",
        "wall_seconds": "wall s",
    }
    names |= {
        "device_seconds": "device s",
        "images_per_s": "images/s",
        "run.device": "device",
        "path": "path",
    }
    columns = [column for column in names if column in table]
    rows = [[text(value) for value in row] for row in table[columns].itertuples(index=False)]
    return [names[column] for column in columns], rows


def text(value: object) -> Cell:
    """A cell; numbers, also those in text, sort as numbers."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "", ""
    try:
        number = float(str(value))
    except ValueError:
        return str(value), str(value)
    return str(value) if isinstance(value, str) else f"{number:.6g}", number


def top1(row: dict, column: str) -> Cell:
    mean = row[column]
    return with_interval(mean, row[f"± {column}"]), "" if np.isnan(mean) else mean


def protocols(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Which protocols, machines and versions the finished runs' results are from, and how many are from each."""
    done = table[(table.status == "done") & table.top1.notna()]
    names = {
        "protocol.features": "features",
        "protocol.probe": "probe",
        "protocol.selection": "setting chosen",
        "protocol.train_split": "fitted on",
        "protocol.n_train": "images fitted on",
        "protocol.eval_split": "scored on",
        "run.images.test": "images scored on",
        "run.images.val": "validation images",
        "protocol.relation.target": "relation",
        "protocol.relation.normalized": "normalized",
        "run.device": "device",
        "run.precision": "precision",
        "run.git_commit": "git commit",
        "run.versions.ssl_runner": "ssl_runner",
        "run.versions.torch": "torch",
    }
    columns = [column for column in names if column in done]
    facts = done[columns].copy()
    facts["protocol.selection"] = (
        facts["protocol.selection"].fillna("").str.replace(r"=.*?\((\w+)\)", r" on \1", regex=True)
    )
    counts = facts.map(lambda value: text(value)[0]).value_counts(sort=True)
    return ["runs", *(names[column] for column in columns)], [[str(n), *row] for row, n in counts.items()]  # type: ignore[misc]
