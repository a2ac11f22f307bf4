"""Rank correlation of measures that need no labels with top-1, over the configurations of a sweep."""

from collections.abc import Callable

import pandas as pd

from ssl_runner.data.skipped import printable
from ssl_runner.report.read import Run

Correlations = tuple[pd.DataFrame, list[str]]  # one row per data set, and notes
MIN_CONFIGURATIONS = 4  # of a correlation
OF_EMBEDDING: dict[str, Callable[[pd.Series], pd.Series]] = {  # higher is better for each
    "effective_rank": lambda values: values,
    "lidar": lambda values: values,
    "alpha_req": lambda values: -(values - 1).abs(),  # the authors: the best exponents are close to 1
}
MEASURES = {f"{prefix}{name}": f for prefix in ("", "backbone_") for name, f in OF_EMBEDDING.items()}
NAMES = {"alpha_req": "-|alpha_req - 1|", "backbone_alpha_req": "-|backbone_alpha_req - 1|"}
NAMED_BY = ("dataset.name", "dataset.root", "dataset.files")
SEVERAL_LOSSES = (
    "The configurations differ in their loss: the authors of RankMe compare runs of one method only."
)


def correlations(runs: list[Run], results: pd.DataFrame) -> Correlations:
    """Spearman's correlations of `finished` runs, one row per data set, and notes on them.

    Runs share a data set if they recorded the same `data_digest`, or without it the same name and root.
    Values are means over the seeds of a configuration. top-1 is that of the test images, or of the validation
    images for data without test images. The column `-loss` is for configurations that share their loss and
    its options. A correlation is nan for fewer than MIN_CONFIGURATIONS values, or equal ones.
    """
    by_path = {printable(run.path): run for run in runs}
    done = [by_path[path] for path in results.path]
    losses = pd.Series([loss_of(run.config) for run in done], results.index, dtype=object)
    methods = pd.Series([run.config.get("loss._target_") for run in done], results.index, dtype=object)
    rows, notes = [], []
    for _, part in results.groupby([data_of(run) for run in done], sort=False):
        config = by_path[part.path.iloc[0]].config
        name = "/".join(config[key] for key in NAMED_BY if config.get(key, "null") != "null")
        if part[["top1", "val_top1"]].isna().all(axis=None):
            continue
        top1 = "top1" if part.top1.notna().any() else "val_top1"
        one_loss = losses[part.index].nunique() == 1
        measures = measures_of(part, one_loss)
        means = measures.assign(top1=part[top1]).groupby(part.configuration).mean()
        n = int((means.top1.notna() & means[list(measures)].notna().any(axis=1)).sum())
        rho = {column: spearman(means[column], means.top1) for column in measures}
        rows.append({"data set": name, "top-1": "test" if top1 == "top1" else "validation", "n": n, **rho})
        if n < MIN_CONFIGURATIONS:
            notes.append(
                f"{name}: {n} configurations with diagnostics; at least {MIN_CONFIGURATIONS} needed."
            )
        elif methods[part.index].nunique() > 1:
            notes.append(f"{name}: {SEVERAL_LOSSES}")
    return pd.DataFrame(rows), notes


def data_of(run: Run) -> str:
    """Text that is equal for runs on the same images and labels, of any folder."""
    named = ",".join(f"{key}={run.config.get(key)}" for key in NAMED_BY)
    return str(run.record.get("data_digest") or named)


def loss_of(config: dict[str, str]) -> str:
    """The loss of a run and its options, as text."""
    return ",".join(f"{key}={value}" for key, value in sorted(config.items()) if key.startswith("loss."))


def measures_of(part: pd.DataFrame, one_loss: bool) -> pd.DataFrame:
    """The measures of each run by their names in the report, oriented so that higher is better."""
    columns = {
        NAMES.get(name, name): orient(pd.to_numeric(part[f"metrics.{name}"], errors="coerce"))
        for name, orient in MEASURES.items()
        if f"metrics.{name}" in part
    }
    if one_loss and "metrics.loss" in part:
        columns["-loss"] = -pd.to_numeric(part["metrics.loss"], errors="coerce")
    return pd.DataFrame(columns, part.index, dtype=float)


def spearman(a: pd.Series, b: pd.Series) -> float:
    """Spearman's rank correlation over the entries that both have; nan for too few or for equal ones."""
    both = a.notna() & b.notna()
    a, b = a[both].rank(), b[both].rank()
    if len(a) < MIN_CONFIGURATIONS or a.nunique() == 1 or b.nunique() == 1:
        return float("nan")
    return float(a.corr(b))
