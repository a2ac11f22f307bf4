"""The HTML page of `ssl-report`: self-contained, without requests; everything from runs is escaped."""

import time
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ssl_runner import __version__
from ssl_runner.data.skipped import printable
from ssl_runner.report.label_free import Correlations
from ssl_runner.report.plots import NAMES
from ssl_runner.report.read import Run
from ssl_runner.report.tables import (
    count_by_status,
    count_runs,
    error_text,
    errors,
    overridden_keys,
    scored,
    with_interval,
)
from ssl_runner.report.terminal import format_cell

CAPTIONS = {
    "curves": "Training curves: mean over the runs of a configuration. With few configurations the band"
    " spans the lowest to the highest run. Failed runs are left out. Losses of different configurations may"
    " be on different scales.",
    "keys": "Top-1 against each option that differs between runs: mean over the configurations with that"
    " value. Error bars: 95 % CI with pooled seed variance. Options are sorted by their effect on validation"
    " top-1.",
    "heat": "Mean top-1 over the two options with the largest effect on validation top-1, averaged over other"
    " options and seeds.",
}
ALTS = {
    "curves": "Line plots of the training loss, and of validation top-1 if it was probed, against the epoch,"
    " with one line per configuration",
    "keys": "Plots of validation and test top-1 against each option that differs between runs",
    "heat": "Heat maps of mean validation top-1 and of mean test top-1 over the values of two options",
}
EMBEDDING_ALTS = {  # files of a run folder
    "embedding.png": "Scatter plot of the features of images in two dimensions, coloured by class",
    "neighbors.png": "Rows of pictures: an image, followed by its nearest training images",
}
RUN_COLUMNS = {
    "metrics.loss": "loss",
    "epochs_done": "epochs done",
    "epochs_asked": "epochs planned",
    "wall_seconds": "time (s)",
    "device_seconds": "device time (s)",
    "images_per_s": "images/s",
    "run.device": "device",
    "path": "path",
    "tags": "tags",
    "note": "note",
}
PROTOCOL_COLUMNS = {
    "protocol.features": "features",
    "protocol.probe": "probe",
    "protocol.selection": "hyperparameter",
    "protocol.train_split": "fitted on",
    "protocol.n_train": "images fitted on",
    "protocol.eval_split": "evaluated on",
    "run.images.test": "test images",
    "run.images.val": "validation images",
    "protocol.relation.target": "relation",
    "protocol.relation.normalized": "normalized",
    "run.device": "device",
    "run.precision": "precision",
    "run.git_commit": "git commit",
    "run.versions.ssl_runner": "ssl_runner",
    "run.versions.torch": "torch",
}
TITLES = {"val_top1": "validation top-1", "top1": "test top-1"}
MAX_ERRORS = 50
MAX_MAPS = 12  # runs whose embedding is shown
Cell = tuple[str, float | str]  # displayed text, sort key


def render(
    title: str,
    runs: list[Run],
    table: pd.DataFrame,
    summary: pd.DataFrame,
    keys: list[str],
    correlations: Correlations,
    pictures: dict[str, bytes],
) -> str:
    """The page as text. `pictures` maps file names to contents; the PNG files are embedded."""
    measures, notes = correlations
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    options = [key for key in overridden_keys(runs) if key not in ("seed", *keys)]
    same = [key for key in options if table[key].nunique() == 1]
    tracebacks = {error_text(run.record.get("error")): run.record.get("traceback") for run in reversed(runs)}
    found = [(error, paths, tracebacks.get(error)) for error, paths in errors(table)]
    mapped = [run for run in runs if any((run.path / name).is_file() for name in EMBEDDING_ALTS)]
    return environment.get_template("report.html").render(
        title=title,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        statuses=count_by_status(table),
        total=count_runs(len(table)),
        shared={key: table[key].dropna().iloc[0] for key in same},
        summary=summary_table(summary, keys),
        no_results="No finished run has a top-1: its images have no labels, and ssl-probe has probed none."
        if (table.status == "done").any()
        else "No run has finished yet.",
        measures=(list(measures), [list(map(format_cell, row)) for row in measures.itertuples(index=False)]),
        notes=notes,
        runs=table_of_runs(table, keys),
        pictures=[
            (ALTS[name], CAPTIONS[name], b64encode(pictures[f"{name}.png"]).decode())
            for name in NAMES
            if f"{name}.png" in pictures
        ],
        maps=[(printable(run.path), embedding_pictures(run)) for run in mapped[:MAX_MAPS]],
        more_maps=len(mapped) - MAX_MAPS,
        errors=found[:MAX_ERRORS],
        more_errors=len(found) - MAX_ERRORS,
        problems=[problem for run in runs for problem in run.problems],
        protocols=protocols(table),
    )


def embedding_pictures(run: Run) -> list[tuple[str, str]]:
    """Alternative text and content, in base64, of each picture of the embedding in the run folder."""
    found = []
    for name, alt in EMBEDDING_ALTS.items():
        with suppress(OSError):  # no such file: the run has not finished, or embedding.method is none
            found.append((alt, b64encode((run.path / name).read_bytes()).decode()))
    return found


def summary_table(summary: pd.DataFrame, keys: list[str]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows, one per configuration: result, number of seeds, keys, other probes."""
    means = [str(column) for column in summary if f"± {column}" in summary]
    main = [column for column in TITLES if column in means]
    others = [column for column in means if column not in main]
    header = [
        *(TITLES[column] for column in main),
        "seeds",
        *keys,
        *(" ".join(c.split(".", 2)[1:]) for c in others),
    ]

    def result(row: dict, column: str) -> Cell:
        mean = row[column]
        return with_interval(mean, row[f"± {column}"]), "" if np.isnan(mean) else mean

    rows = [
        [result(row, c) for c in main]
        + [cell(row[c]) for c in ("n", *keys)]
        + [result(row, c) for c in others]
        for row in summary.to_dict("records")
    ]
    return header, rows


def table_of_runs(table: pd.DataFrame, keys: list[str]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows, one per run, with the most used columns; runs.csv has all."""
    names = {"status": "status", **TITLES, **{key: key for key in [*keys, "seed"]}, **RUN_COLUMNS}
    columns = [column for column in names if column in table]
    rows = [[cell(value) for value in row] for row in table[columns].itertuples(index=False)]
    return [names[column] for column in columns], rows


def cell(value: object) -> Cell:
    """Numbers, also those in text, sort as numbers."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "", ""
    try:
        number = float(str(value))
    except ValueError:
        return str(value), str(value)
    return str(value) if isinstance(value, str) else f"{number:.6g}", number


def protocols(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows: protocol, machine and versions of finished runs, with the number of runs of each."""
    done = scored(table)
    columns = [column for column in PROTOCOL_COLUMNS if column in done]
    facts = done[columns].copy()
    selection = facts["protocol.selection"].fillna("")  # its value is left out, as runs differ in it
    facts["protocol.selection"] = selection.str.replace(r"=.*?\((\w+)\)", r" on \1", regex=True)
    counts = facts.map(lambda value: cell(value)[0]).value_counts(sort=True)
    rows = [[str(n), *row] for *row, n in counts.reset_index().itertuples(index=False, name=None)]
    return ["runs", *(PROTOCOL_COLUMNS[column] for column in columns)], rows
