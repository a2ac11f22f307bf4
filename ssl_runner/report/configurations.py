"""Configurations of runs: the options in which runs differ, and means over seeds with intervals."""

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ssl_runner.config.run_id import changes_result
from ssl_runner.report.read import Run
from ssl_runner.report.tables import MAIN, options, overridden_keys, scored, top1_columns

# options and groups that change no accuracy. Only runs on equal images are compared, of any name and folder
NO_ACCURACY = (
    *("diagnostics.every", "views.preview", "embedding", "hparams_search"),
    *("dataset.name", "dataset.root", "dataset.storage"),
)
MIN_SEEDS = 3  # of an interval
ROUNDING = 1e-12  # deviations of equal values
MEASURES = {  # columns of metrics.csv that describe Z -> name and unit
    "metrics.rank": "rank (directions)",
    "metrics.effective_rank": "effective rank (directions)",
    "metrics.alignment": "alignment (0 to 1)",
    "metrics.loss_gap": "loss gap (units of the loss)",
    "metrics.label_energy": "label energy (0 to 1)",
}


def swept_keys(runs: list[Run]) -> list[str]:
    """The options in which runs differ, except the seed and seeds that follow it.

    These are overridden keys, then keys of the resolved configuration that differ among runs which agree in
    all others: for example a default that has changed. A key that a run's configuration lacks does not
    differ.
    """
    first = overridden_keys(runs)
    table = pd.DataFrame([run.config | options(run, first) for run in runs])
    differ = [str(key) for key in table if table[key].nunique() > 1 and not follows_seed(table, str(key))]
    keys = [key for key in first if key in differ]
    for key in differ:
        if key not in keys and table.groupby(number_configurations(table, keys))[key].nunique().max() > 1:
            keys.append(key)
    return keys


def follows_seed(table: pd.DataFrame, key: str) -> bool:
    """Whether a key only separates runs of one configuration.

    This holds for the seed, for another seed that has one value per seed, and for options that change no
    accuracy.
    """
    if (
        key == "seed"
        or not changes_result(key)
        or any(key == name or key.startswith(f"{name}.") for name in NO_ACCURACY)
    ):
        return True
    return key.rpartition(".")[2].endswith("seed") and table.groupby("seed")[key].nunique().max() == 1


def number_configurations(table: pd.DataFrame, keys: list[str]) -> pd.Series:
    """A number for each row, equal for rows that agree in all keys."""
    return table.groupby(keys, dropna=False, sort=False).ngroup() if keys else pd.Series(0, index=table.index)


def finished(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The rows of `scored` with the number of their `configuration`. Without a seed, each run has its own."""
    results = scored(table).copy()
    results["seed"] = results.seed.fillna(results.path)
    results["configuration"] = number_configurations(results, keys)
    columns = top1_columns(results)
    values = results[columns].apply(pd.to_numeric, errors="coerce")
    results[columns] = values.where((values >= 0) & (values <= 1))
    return results.copy()  # in one block


def over_seeds(results: pd.DataFrame, by: str, values: list[str]) -> pd.DataFrame:
    """Means of the columns `values` for each value of `by`, with 95 % confidence intervals over seeds.

    A mean is taken over the configurations' means over seeds. Column "± name" is the half-width of the
    interval, `n` the number of seeds of all configurations together. For m configurations of n_i seeds, whose
    variances over seeds are pooled into s^2 with f = sum (n_i - 1) degrees of freedom,

        half-width = t(f) s sqrt(sum 1 / n_i) / m

    which is Student's interval for one configuration. It is nan unless a configuration has MIN_SEEDS seeds,
    and if seeds change nothing, as for raw pixels. Runs with the same seed are averaged first.
    """
    seeds = results.groupby([results[by].rename("by"), "configuration", "seed"], sort=False)[values]
    means = seeds.mean().astype(float)
    groups = means.groupby(level=["by", "configuration"], sort=False)
    n, mean, variance = groups.count(), groups.mean(), groups.var().fillna(0)
    n = n.where(n > 0)

    def total(table: pd.DataFrame) -> pd.DataFrame:
        return table.groupby(level="by", sort=False).sum()

    f = total(n - 1)
    t = pd.DataFrame(stdtrit(f.clip(lower=1).to_numpy(), 0.975), f.index, f.columns)
    half = t * (total((n - 1) * variance) / f * total(1 / n)) ** 0.5 / total(n / n)
    enough = n.groupby(level="by", sort=False).max() >= MIN_SEEDS
    half = half.where(enough & (half > ROUNDING))
    table = mean.groupby(level="by", sort=False).mean().join(half.add_prefix("± "))
    return table.assign(n=means.groupby(level="by").size())


def summarise(results: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per configuration, sorted by validation top-1.

    The columns are `method`, `rows` (index values in `results`), the keys, every top-1 and MEASURES by
    `over_seeds`.
    """
    values = [column for column in top1_columns(results) if not repeats_main(results, column)]
    measures = [name for name in MEASURES if name in results]
    results[measures] = results[measures].apply(pd.to_numeric, errors="coerce")
    groups = results.groupby("configuration", sort=False)
    configurations = groups[["method", *keys]].first()
    configurations.insert(
        0, "rows", pd.Series({number: list(rows) for number, rows in groups.groups.items()})
    )
    summary = configurations.join(over_seeds(results, "configuration", values + measures))
    return summary.sort_values("val_top1", ascending=False, kind="stable").reset_index(drop=True)


def repeats_main(results: pd.DataFrame, column: str) -> bool:
    """Whether a column is `val_top1` or `top1` under the name of its probe, in every run."""
    split = column.split(".")[1] if column not in MAIN else ""
    main = {"val": "val_top1", "test": "top1"}.get(split)
    if main is None or not results[column].equals(results[main]):
        return False
    names = f"top1.{split}." + results["protocol.features"] + "." + results["protocol.probe"]
    return bool((names[results[column].notna()] == column).all())


def is_numeric(values: pd.Series) -> bool:
    """Whether all values of an option are finite numbers."""
    return bool(np.isfinite(pd.to_numeric(values.dropna(), errors="coerce")).all())


def binned(values: pd.Series, bins: int, most: int) -> pd.Series:
    """The values, or for more than `most` different numbers their quantile bins; missing values stay so."""
    if not is_numeric(values) or values.nunique() <= most:
        return values
    return pd.qcut(pd.to_numeric(values), bins, duplicates="drop").astype(object)


def effect(results: pd.DataFrame, key: str) -> float:
    """The range of mean validation top-1 over the values of a key, the largest of all losses.

    Many numbers are put in five bins.
    """
    values = binned(results[key], 5, 8)
    means = results.val_top1.astype(float).groupby([results.method, values]).mean().groupby(level=0)
    return float(np.nan_to_num((means.max() - means.min()).max()))


def with_interval(mean: float, half: float, unit: float = 1) -> str:
    """`0.9660 ± 0.0021`, or `96.60 ± 0.21` in units of 0.01.

    The interval is left out if it is nan. One that exceeds [0, 1] is cut off: `0.9950 (0.9880 to 1.0000)`.
    """
    if np.isnan(mean):
        return "-"
    digits = 4 if unit == 1 else 2
    center, width, low, high = (
        f"{value / unit:.{digits}f}" for value in (mean, half, max(mean - half, 0), min(mean + half, 1))
    )
    if np.isnan(half):
        return center
    return f"{center} ± {width}" if half <= min(mean, 1 - mean) else f"{center} ({low} to {high})"
