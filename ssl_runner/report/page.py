"""The HTML page of `ssl-report`: self-contained, without requests; everything from runs is escaped."""

import time
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ssl_runner import __version__
from ssl_runner.data.skipped import printable
from ssl_runner.errors import counted
from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.figures.style import MIN_FONT, Picture
from ssl_runner.report.label_free import Correlations
from ssl_runner.report.page_tables import (
    attributes,
    correlation_table,
    folder_link,
    protocol_table,
    runs_table,
    summary_table,
)
from ssl_runner.report.read import Run
from ssl_runner.report.tables import count_by_status, error_text, errors, overridden_keys

CAPTIONS = {
    "keys": "Top-1 against each option that differs between runs: mean over the configurations with that"
    " value, for each loss by itself. Error bars: 95 % CI with pooled seed variance; below three seeds, small"
    " points show each seed instead. Lines join values for which the other options are the same. Options are"
    " sorted by their effect on validation top-1.",
    "heat": "Mean top-1 over the two options with the largest effect on validation top-1, averaged over other"
    " options and seeds. The losses share the colour scale.",
    "measures": "Top-1 against what is measured of the embeddings Z: one point per configuration, mean over"
    " seeds, at the last epoch. Loss gaps of different losses have different units and panels of their own.",
    "spectra": "Singular values of Z on the images of the diagnostics, divided by √N, compared with those of"
    " the loss's closed-form optimum, where it is known.",
    "curves": "Training curves: mean over the runs of a configuration, one row per loss. With few"
    " configurations the band spans the lowest to the highest run. Failed runs are left out.",
}
ALTS = {
    "keys": "Plots of validation and test top-1 against each option that differs between runs",
    "heat": "Heat maps of mean validation top-1 and of mean test top-1 over the values of two options",
    "measures": "Scatter plots of top-1 against rank, effective rank, alignment, loss gap and label energy",
    "spectra": "Line plots of the singular values of the embeddings and of the closed form, with one panel"
    " per configuration",
    "curves": "Line plots of the training loss, and of validation top-1 if it was probed, against the epoch,"
    " with one line per configuration",
}
EMBEDDING_ALTS = {  # files of a run folder
    "embedding.png": "Scatter plot of the features of images in two dimensions, coloured by class",
    "neighbors.png": "Rows of pictures: an image, followed by its nearest training images",
}
UNLABELLED = "No finished run has a top-1: its images have no labels, and ssl-probe has probed none."
LOST = "No finished run has a top-1: run.json and probe.csv have none that is valid."
FAILURES = (
    ("Refusals", "Runs that ended because an option or a file was not accepted."),
    ("Failures", "Runs that an error ended."),
)
MIN_PIXELS = 10  # of the smallest text of a figure; narrower screens scroll
MAX_ERRORS = 50  # of each kind
MAX_MAPS = 12  # runs whose embedding is shown
Drawn = dict[str, tuple[Picture, dict[str, bytes]]]


def render(
    title: str,
    out: Path,
    runs: list[Run],
    table: pd.DataFrame,
    comparisons: list[Comparison],
    correlations: Correlations,
    pictures: list[Drawn],
) -> str:
    """The page as text, for the folder `out`, to which links are relative.

    `pictures` are the figures of the first comparisons; their PNG files are embedded.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    keys = list(dict.fromkeys(key for part in comparisons for key in part.keys))
    options = [key for key in overridden_keys(runs) if key not in ("seed", *keys)]
    same = [key for key in options if table[key].nunique(dropna=False) == 1 and table[key].notna().all()]
    maps, more_maps = embeddings(runs, table, keys)
    drawn = [*pictures, *({} for _ in comparisons[len(pictures) :])]
    return environment.get_template("report.html").render(
        title=title,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        statuses=count_by_status(table),
        total=counted(len(table), "run"),
        shared={key: table[key].iloc[0] for key in same},
        choices={
            "data": sorted(set(table.data)),
            "status": sorted(set(table.status)),
            "tags": sorted({tag for run in runs for tag in run.tags}),
        },
        comparisons=[section(part, number, drawn[number]) for number, part in enumerate(comparisons)],
        undrawn=len(comparisons) - len(pictures),
        several_measured=len(correlations[0]) > 0 and correlations[0].n.max() > 1,
        measures=correlation_table(correlations[0]),
        notes=correlations[1],
        runs=runs_table(runs, table, keys, out),
        maps=maps,
        more_maps=more_maps,
        failures=failures(runs, table, out),
        problems=[problem for run in runs for problem in run.problems],
        protocols=protocol_table(table),
    )


def section(part: Comparison, number: int, drawn: Drawn) -> dict[str, Any]:
    """A comparison: its runs, table and figures."""
    pictures = [
        {
            "id": f"{name}-{number + 1}",
            "alt": f"{ALTS[name]} ({part.title})",
            "caption": CAPTIONS[name],
            "notes": picture.notes,
            "width": round(96 * picture.figure.get_figwidth()),
            "least": round(72 * MIN_PIXELS / MIN_FONT * picture.figure.get_figwidth()),
            "png": b64encode(contents["png"]).decode(),
        }
        for name, (picture, contents) in drawn.items()
    ]
    rows = " ".join(map(str, part.table.index))
    done = [run for run in part.runs.values() if run.status == "done"]
    labelled = any(run.record.get("classes") for run in done)
    missing = (LOST if labelled else UNLABELLED) if done else "No run has finished yet."
    return {
        "title": part.title,
        "runs": rows,
        "pictures": pictures,
        "missing": missing,
        **summary_table(part),
    }


def embeddings(runs: list[Run], table: pd.DataFrame, keys: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The pictures of the embeddings of the best runs on each data set, and how many more have pictures."""
    val_top1 = pd.to_numeric(table.val_top1, errors="coerce").groupby(table.data)
    best = val_top1.rank("first", ascending=False, na_option="bottom").sort_values(kind="stable").index
    mapped = [row for row in best if any((runs[row].path / name).is_file() for name in EMBEDDING_ALTS)]
    maps = [
        {
            "row": row,
            "path": printable(runs[row].path),
            "label": ", ".join([table.data[row], table.method[row], *options_of(table.loc[row, keys])]),
            "pictures": embedding_pictures(runs[row]),
        }
        for row in mapped[:MAX_MAPS]
    ]
    return maps, len(mapped) - MAX_MAPS


def options_of(values: pd.Series) -> list[str]:
    """`key=value` of each value that is not missing, except the loss."""
    return [f"{key}={value}" for key, value in values.dropna().items() if key != "loss"]


def embedding_pictures(run: Run) -> list[tuple[str, str]]:
    """Alternative text and content, in base64, of each picture of the embedding in the run folder."""
    found = []
    for name, alt in EMBEDDING_ALTS.items():
        with suppress(OSError):  # no such file: the run has not finished, or embedding.method is none
            found.append((alt, b64encode((run.path / name).read_bytes()).decode()))
    return found


def failures(runs: list[Run], table: pd.DataFrame, out: Path) -> list[dict[str, Any]]:
    """Sections of refused runs and of those that failed: heading, explanation, errors by frequency."""
    by_kind: dict[str, list[dict[str, Any]]] = {heading: [] for heading, _ in FAILURES}
    for error, rows in errors(table):
        refused = error.startswith("UsageError")
        by_kind[FAILURES[not refused][0]].append(
            {
                "error": error.removeprefix("UsageError: "),
                "rows": rows,
                "trace": "" if refused else runs[rows[0]].record.get("traceback"),
                "runs": [
                    {
                        "attributes": attributes(runs[row], row, table.data[row])
                        | {"data-error": error_text(error)},
                        "href": folder_link(runs[row], out),
                        "path": printable(runs[row].path),
                        "options": " ".join(f"{key}={value}" for key, value in runs[row].overrides.items()),
                    }
                    for row in rows
                ],
            }
        )
    return [
        {"heading": heading, "text": text, "errors": found[:MAX_ERRORS], "more": len(found) - MAX_ERRORS}
        for (heading, text), found in zip(FAILURES, by_kind.values(), strict=True)
        if found
    ]
