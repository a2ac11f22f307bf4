"""Comparisons: the runs on the same images that were evaluated in the same way. Only these are ranked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ssl_runner.data.skipped import printable
from ssl_runner.report.configurations import effect, finished, summarise, swept_keys
from ssl_runner.report.read import Run
from ssl_runner.report.tables import NAMED_BY, Row, data_of, main_probe, named_data, runs_table, scores

Protocol = tuple[tuple[str, str], ...]


@dataclass
class Comparison:
    """Runs whose results may be ranked.

    title     the images, and how they were evaluated
    runs      row of `table` -> run
    table     the rows of the table of all runs, of this comparison and not failed
    results   those that have finished with a result, with their `configuration`
    keys      the options in which the runs differ: the loss, then those with the largest effect
    summary   one row per configuration, best validation top-1 first
    """

    title: str
    runs: dict[int, Run]
    table: pd.DataFrame
    results: pd.DataFrame
    keys: list[str]
    summary: pd.DataFrame

    @property
    def names(self) -> list[str]:
        """The columns that tell configurations apart: `keys`, and the class of the loss if it differs."""
        several = "loss" not in self.keys and self.table.method.nunique() > 1
        return ["method", *self.keys] if several else self.keys


def compare(runs: list[Run]) -> tuple[pd.DataFrame, list[Comparison]]:
    """The table of all runs, and the comparisons that they form, those with most runs first.

    Unfinished runs, which have no protocol yet, join the largest comparison on their images.
    """
    data = data_of_all(runs)
    groups = grouped(runs, data)
    keys = [swept_keys([runs[row] for row in rows]) for rows in groups.values()]
    table = runs_table(runs, list(dict.fromkeys(key for some in keys for key in some)))
    names = data_names(dict(zip(reversed(data), reversed(runs), strict=True)))
    table.insert(1, "data", [names[one] for one in data])
    comparisons = []
    for (one, protocol), rows, swept in zip(groups, groups.values(), keys, strict=True):
        part = table.loc[rows]
        results = finished(part, swept)
        swept.sort(key=lambda key: (key != "loss", -effect(results, key)))
        comparisons.append(
            Comparison(
                title=title(names[one], protocol, [other for data, other in groups if data == one]),
                runs={row: runs[row] for row in rows},
                table=part,
                results=results,
                keys=swept,
                summary=summarise(results, swept),
            )
        )
    return table, comparisons


def data_of_all(runs: list[Run]) -> list[str]:
    """`data_of` each run. An unfinished one without digest has that of the runs with the same data options.

    A run that failed or was stopped while it read its images has recorded none.
    """
    digests: dict[str, set[str]] = {}
    for run in runs:
        if run.record.get("data_digest"):
            digests.setdefault(named_data(run), set()).add(data_of(run))
    found = []
    for run in runs:
        [*known] = digests.get(named_data(run), ())
        unread = run.status != "done" and not run.record.get("data_digest")
        found.append(known[0] if unread and len(known) == 1 else data_of(run))
    return found


def grouped(runs: list[Run], data: list[str]) -> dict[tuple[str, Protocol], list[int]]:
    """(data, protocol) -> indices of runs that have not failed, in order; most runs first."""
    groups: dict[tuple[str, Protocol], list[int]] = {}
    unfinished = []
    for row, run in enumerate(runs):
        if is_scored(run):
            groups.setdefault((data[row], protocol_of(run)), []).append(row)
        elif run.status != "failed":
            unfinished.append(row)
    largest = {group[0]: group for group in sorted(groups, key=lambda group: len(groups[group]))}
    for row in unfinished:
        groups.setdefault(largest.get(data[row], (data[row], ())), []).append(row)
    return {key: sorted(rows) for key, rows in sorted(groups.items(), key=lambda group: -len(group[1]))}


def is_scored(run: Run) -> bool:
    """Whether a run has finished with a top-1, if only of ssl-probe."""
    return run.status == "done" and any(value is not None for value in scores(run).values())


def protocol_of(run: Run) -> Protocol:
    """What must agree for two results on the same images to be comparable; () without a result on them."""
    test, _ = main_probe(run)
    if not test:
        return ()
    split = str(test.get("eval_split"))
    values: Row = {name: test.get(name) for name in ("probe", "features", "train_split")}
    images = (run.record.get("images") or {}).get(split)
    return tuple((key, str(value)) for key, value in (values | {"split": split, "images": images}).items())


def title(name: str, protocol: Protocol, others: Sequence[Protocol]) -> str:
    """Such as `mnist5k: knn on backbone, 1000 test images`.

    The split that is fitted follows if it differs between the protocols on the same images.
    """
    if not protocol:
        return name
    named = dict(protocol)
    number = f"{named['images']} " if named["images"] != "None" else ""
    several = len({dict(other)["train_split"] for other in others if other}) > 1
    fitted = f", fitted on {named['train_split']}" if several else ""
    return f"{name}: {named['probe']} on {named['features']}, {number}{named['split']} images{fitted}"


def data_names(of: dict[str, Run]) -> dict[str, str]:
    """Data -> its name, different for different data: with root and file list or the digest where needed.

    `of` has a run on each.
    """
    names = {
        data: printable(run.config.get("dataset.name") or run.choices.get("dataset") or "data")
        for data, run in of.items()
    }
    for more in (lambda run, data: [run.config.get(key) for key in NAMED_BY[1:]], lambda run, data: [data]):
        count = Counter(names.values())
        for data, run in of.items():
            if count[names[data]] > 1:
                words = [printable(word) for word in more(run, data) if word not in (None, "null")]
                names[data] = " ".join([names[data], *words])
    return names


def table_of_configurations(comparisons: list[Comparison]) -> pd.DataFrame:
    """The summaries of all comparisons: title, loss, options, number of seeds, means and intervals."""
    parts = []
    for part in comparisons:
        first = ["method", *part.keys, "n"]
        rest = [column for column in part.summary if column not in ("rows", *first)]
        parts.append(part.summary[first + rest].assign(comparison=part.title))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return table[["comparison", *table.columns.drop("comparison")]] if parts else table
