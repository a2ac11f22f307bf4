"""Rank correlation of measures that need no labels with top-1, over the configurations of a sweep."""

from collections.abc import Callable

import pandas as pd

from ssl_runner.report.comparisons import Comparison

Correlations = tuple[pd.DataFrame, list[str]]  # one row per data set, and notes
MIN_CONFIGURATIONS = 4  # of a correlation
OF_EMBEDDING: dict[str, Callable[[pd.Series], pd.Series]] = {  # higher is better for each
    "effective_rank": lambda values: values,
    "lidar": lambda values: values,
    "alpha_req": lambda values: -(values - 1).abs(),  # the authors: the best exponents are close to 1
}
MEASURES = {f"{prefix}{name}": f for prefix in ("", "backbone_") for name, f in OF_EMBEDDING.items()}
NAMES = {"alpha_req": "-|alpha_req - 1|", "backbone_alpha_req": "-|backbone_alpha_req - 1|"}
SEVERAL_LOSSES = (
    "The configurations differ in their loss: the authors of RankMe compare runs of one method only."
)


def correlations(comparisons: list[Comparison]) -> Correlations:
    """Spearman's correlations of finished runs, one row per comparison, and notes on them.

    Values are means over the seeds of a configuration. top-1 is that of the test images, or of the validation
    images for data without test images. The column `-loss` is for configurations that share their loss and
    its options. A correlation is nan for fewer than MIN_CONFIGURATIONS values, or equal ones.
    """
    rows, notes = [], []
    for part in comparisons:
        results = part.results
        if results[["top1", "val_top1"]].isna().all(axis=None):
            continue
        top1 = "top1" if results.top1.notna().any() else "val_top1"
        losses = {loss_of(part.runs[row].config) for row in results.index}
        measures = measures_of(results, len(losses) == 1)
        means = measures.assign(top1=results[top1]).groupby(results.configuration).mean()
        n = int((means.top1.notna() & means[list(measures)].notna().any(axis=1)).sum())
        rho = {column: spearman(means[column], means.top1) for column in measures}
        rows.append(
            {"data set": part.title, "top-1": "test" if top1 == "top1" else "validation", "n": n, **rho}
        )
        if n < MIN_CONFIGURATIONS:
            notes.append(
                f"{part.title}: {n} configurations with such measures; at least {MIN_CONFIGURATIONS} needed."
            )
        elif results.method.nunique() > 1:
            notes.append(f"{part.title}: {SEVERAL_LOSSES}")
    return pd.DataFrame(rows), notes


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
