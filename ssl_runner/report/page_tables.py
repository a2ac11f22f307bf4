"""The tables of the page: columns, and rows of cells that sort as numbers where they are numbers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import MEASURES, with_interval
from ssl_runner.report.read import Run
from ssl_runner.report.tables import scored
from ssl_runner.report.terminal import format_cell

TITLES = {"val_top1": "validation top-1 (%)", "top1": "test top-1 (%)"}
RUN_COLUMNS = {
    "metrics.loss": "loss value",
    "epochs_done": "epochs done",
    "epochs_asked": "epochs planned",
    "wall_seconds": "time (s)",
    "device_seconds": "device time (s)",
    "images_per_s": "images/s",
    "run.started": "started",
    "run.device": "device",
    "tags": "tags",
    "note": "note",
}
PROTOCOL_COLUMNS = {
    "data": "data set",
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
FILES = (
    *("run.json", "metrics.csv", "probe.csv", "spectrum.csv", "embedding.png", "neighbors.png"),
    *("views.png", "profile.txt"),
)
Cell = dict[str, Any]  # displayed text, sort key, links as (text, address)
Table = dict[str, list]  # columns: name, shown; rows: attributes of the HTML element, cells


def summary_table(part: Comparison) -> Table:
    """One row per configuration: result, number of seeds, keys, other probes, measures of Z."""
    means = [str(column) for column in part.summary if f"± {column}" in part.summary]
    main = [column for column in TITLES if column in means]
    others = [column for column in means if column not in main and column not in MEASURES]
    measures = [column for column in MEASURES if column in means and part.summary[column].notna().any()]
    names = [
        *(TITLES[name] for name in main),
        "seeds",
        *("loss" if key == "method" else key for key in part.names),
    ]
    names += [f"{' '.join(name.split('.', 2)[1:])} (%)" for name in others]
    columns = [{"name": name, "shown": True} for name in names]
    columns += [{"name": MEASURES[name], "shown": False} for name in measures]
    rows = [
        {
            "attributes": {"data-runs": " ".join(map(str, row["rows"]))},
            "cells": [
                *(accuracy(row[name], row[f"± {name}"]) for name in main),
                *(cell(row[name]) for name in ("n", *part.names)),
                *(accuracy(row[name], row[f"± {name}"]) for name in others),
                *(cell(row[name], digits=4) for name in measures),
            ],
        }
        for row in part.summary.to_dict("records")
    ]
    return {"columns": columns, "rows": rows}


def runs_table(runs: list[Run], table: pd.DataFrame, keys: list[str], out: Path) -> Table:
    """One row per run that has not failed, with the most used columns; runs.csv has all."""
    names = {"data": "data set", "status": "status", **TITLES, "method": "loss", **{key: key for key in keys}}
    names |= {"seed": "seed", **RUN_COLUMNS, **MEASURES}
    names = {column: name for column, name in names.items() if column in table}
    if "loss" in names:
        del names["method"]
    columns = [{"name": name, "shown": column not in MEASURES} for column, name in names.items()]
    rows = []
    for row in table.index[table.error.isna()]:
        run, record = runs[row], table.loc[row]
        cells = [accuracy(record[name]) if name in TITLES else cell(record[name], digits=6) for name in names]
        links = {"key": record["path"], "text": "", "links": file_links(run, record["path"], out)}
        rows.append({"attributes": attributes(run, row, record["data"]), "cells": [*cells, links]})
    return {"columns": [*columns, {"name": "folder and files", "shown": True}], "rows": rows}


def attributes(run: Run, row: int, data: str) -> dict[str, Any]:
    """What the filters of the page compare, as attributes of an HTML element."""
    date = str(run.record.get("started") or "")[:10]
    tags = json.dumps(run.tags)
    return {
        "data-run": row,
        "data-data": data,
        "data-status": run.status,
        "data-tags": tags,
        "data-date": date,
    }


def folder_link(run: Run, out: Path, name: str = "") -> str:
    """The address of a run folder or of a file in it, relative to the page in `out`."""
    path = os.path.relpath(run.path / name, out)
    return quote(os.fsencode(Path(path).as_posix()))


def file_links(run: Run, path: str, out: Path) -> list[tuple[str, str]]:
    """Name and address of the run folder and of its files."""
    try:
        present = {path.name for path in run.path.iterdir()}
    except OSError:  # removed in the meantime
        present = set()
    folder = folder_link(run, out)
    return [(path, folder), *((name, f"{folder}/{name}") for name in FILES if name in present)]


def correlation_table(measures: pd.DataFrame) -> Table:
    rows = [
        {"attributes": {}, "cells": [cell(format_cell(value)) for value in row]}
        for row in measures.itertuples(index=False)
    ]
    return {"columns": shown(map(str, measures)), "rows": rows}


def protocol_table(table: pd.DataFrame) -> Table:
    """Protocol, machine and versions of finished runs, with the number of runs of each."""
    done = scored(table)
    columns = [column for column in PROTOCOL_COLUMNS if column in done]
    facts = done[columns].copy()
    selection = facts["protocol.selection"].fillna("")  # its value is left out, as runs differ in it
    facts["protocol.selection"] = selection.str.replace(r"=.*?\((\w+)\)", r" on \1", regex=True)
    counts = facts.map(lambda value: cell(value, digits=6)["text"]).value_counts(sort=True)
    rows = [
        {"attributes": {}, "cells": [cell(value) for value in (n, *row)]}
        for *row, n in counts.reset_index().itertuples(index=False, name=None)
    ]
    return {"columns": shown(["runs", *(PROTOCOL_COLUMNS[column] for column in columns)]), "rows": rows}


def shown(names: Sequence[str] | map) -> list[dict[str, Any]]:
    return [{"name": name, "shown": True} for name in names]


def accuracy(mean: object, half: float = np.nan) -> Cell:
    """A fraction in per cent."""
    value = float(mean) if isinstance(mean, int | float) else np.nan
    text = "" if np.isnan(value) else with_interval(value, half, unit=0.01)
    return {"text": text, "key": "" if np.isnan(value) else value, "links": []}


def cell(value: object, digits: int = 6) -> Cell:
    """Numbers, also those in text, sort as numbers."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return {"text": "", "key": "", "links": []}
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        return {"text": text, "key": text, "links": []}
    return {"text": text if isinstance(value, str) else f"{number:.{digits}g}", "key": number, "links": []}
