"""`ssl-report FOLDER…`: all runs below some folders as one table, plots and one HTML page, in whatever state the runs are."""

import shutil
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ssl_runner.report.read import Row, Run

OF_A_RUN = {"seed", "resume"}  # settings in which runs of one setting may differ
UNTOLD = {
    "status",
    "error",
    "traceback",
    "classes",
    "pid",
    "process_started",
    "wall_seconds",
    "processes",
    "top1",
    "val_top1",
}
MAIN = ("val_top1", "top1")  # the results that settings are compared by
LINES = 30  # of settings on the terminal


def overridden(runs: list[Run]) -> list[str]:
    """V, epochs, seed, and every key that any run overrides."""
    return list(dict.fromkeys(["V", "epochs", "seed", *(key for run in runs for key in run.overrides)]))


def runs_table(runs: list[Run], swept: list[str]) -> pd.DataFrame:
    """A row a run, in their order: path, status and error; every key that any run overrides or that is swept, as text; top-1;
    protocol; metrics; cost; and what else run.json says."""
    keys = list(dict.fromkeys([*overridden(runs), *swept]))
    parts = [state, lambda run: settings(run, keys), scores, protocol, metrics, cost, facts]
    groups = [[part(run) for run in runs] for part in parts]
    columns = dict.fromkeys(
        column for rows in groups for row in rows for column in row
    )  # a part's columns stay together
    merged = [
        {column: value for row in rows for column, value in row.items()} for rows in zip(*groups, strict=True)
    ]
    return pd.DataFrame(merged, columns=list(columns))


def state(run: Run) -> Row:
    return {"path": str(run.path), "status": run.status, "error": one_line(run.record.get("error"))}


def one_line(error: object) -> str | None:
    return " ".join(str(error or "").split()) or None


def settings(run: Run, keys: Sequence[str]) -> Row:
    """The run's value of each key: a group's choice, else what the resolved configuration has, else the override's text."""
    return {key: run.choices.get(key) or run.config.get(key) or run.overrides.get(key) for key in keys}


def scores(run: Run) -> Row:
    """The run's main result `top1` and `val_top1`, and the last of every probe as top1.<split>.<features>.<probe>."""
    _, val = main_probe(run)
    row = {"top1": run.record.get("top1"), "val_top1": run.record.get("val_top1", val.get("top1"))}
    return row | {
        f"top1.{p.get('eval_split')}.{p.get('features')}.{p.get('probe')}": p.get("top1") for p in run.probes
    }


def main_probe(run: Run) -> tuple[Row, Row]:
    """The rows of probe.csv that `top1` is from: the first that was scored on the test set, and the same probe on validation."""
    test = next((row for row in run.probes if row.get("eval_split") == "test"), {})
    same = [
        row
        for row in run.probes
        if all(row.get(key) == test.get(key) for key in ("epoch", "probe", "features"))
    ]
    return test, next((row for row in same if row.get("eval_split") == "val"), {})


def protocol(run: Run) -> Row:
    """What `top1` means: which features a probe read, what it was fitted and scored on, and on which relation was trained."""
    test, _ = main_probe(run)
    names = ("features", "probe", "selection", "train_split", "n_train", "eval_split")
    relation = run.record.get("relation") or {}
    told = {f"relation.{key}": relation.get(key) for key in ("target", "normalized", "pairs")}
    return {
        f"protocol.{name}": value for name, value in ({name: test.get(name) for name in names} | told).items()
    }


def metrics(run: Run) -> Row:
    return {"epochs_done": run.last.get("epoch", 0), "epochs_asked": epochs_asked(run)} | {
        f"metrics.{name}": value for name, value in run.last.items()
    }


def epochs_asked(run: Run) -> str | None:
    """The epochs that the run is to have; a closed form makes passes instead."""
    return run.config.get("solver.passes" if run.config.get("solver.name") == "closed_form" else "epochs")


def cost(run: Run) -> Row:
    """Seconds on the wall, processes, seconds of all devices together, and the median epoch's images a second."""
    wall, processes = run.record.get("wall_seconds"), run.record.get("processes") or 1
    rate = run.rate[np.isfinite(run.rate)]
    seconds = None if wall is None else wall * processes
    row = {"wall_seconds": wall, "processes": processes, "device_seconds": seconds}
    return row | {"images_per_s": np.median(rate) if len(rate) else None}


def facts(run: Run) -> Row:
    """What else run.json says, as run.<name>: commit, versions, device, precision, command, numbers of images and parameters…"""
    told = {key: value for key, value in run.record.items() if key not in UNTOLD | {"relation", "loss"}}
    nested = [(key, value if isinstance(value, dict) else {"": value}) for key, value in told.items()]
    return {
        f"run.{key}.{name}".rstrip("."): value for key, values in nested for name, value in values.items()
    }


def swept(runs: list[Run]) -> list[str]:
    """The settings in which the runs differ, but for the seed and what follows it: overridden keys, then keys of the resolved
    configuration that differ among runs which share all of these (a default that has changed, say). A key that a run's
    configuration lacks does not differ."""
    first = overridden(runs)
    told = pd.DataFrame([run.config | settings(run, first) for run in runs])
    differ = [str(key) for key in told if told[key].nunique() > 1 and not follows_seed(told, str(key))]
    keys = [key for key in first if key in differ]
    for key in differ:
        if key not in keys and told.groupby(number_settings(told, keys))[key].nunique().max() > 1:
            keys.append(key)
    return keys


def follows_seed(told: pd.DataFrame, key: str) -> bool:
    """Whether a key only tells runs of one setting apart: the seed, or another seed that is the same wherever the seed is."""
    if key in OF_A_RUN:
        return True
    return key.rpartition(".")[2].endswith("seed") and told.groupby("seed")[key].nunique().max() == 1


def number_settings(table: pd.DataFrame, keys: list[str]) -> pd.Series:
    """The number of the setting of each row: the same where all keys are."""
    return table.groupby(keys, dropna=False, sort=False).ngroup() if keys else pd.Series(0, index=table.index)


def finished(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The rows of runs that are done, with the number of their `setting`; who has no seed is a seed of its own."""
    results = table[(table.status == "done") & table.top1.notna()].copy()
    results["seed"] = results.seed.fillna(results.path)
    results["setting"] = number_settings(results, keys)
    scored = [str(column) for column in results if column in MAIN or str(column).startswith("top1.")]
    results[scored] = results[scored].apply(pd.to_numeric, errors="coerce")
    return results


def over_seeds(results: pd.DataFrame, by: str, values: list[str]) -> pd.DataFrame:
    """For each value of `by`, the mean over its settings of their means over seeds, of some columns; the half-width of its 95 %
    interval as "± column"; and the number of seeds of all its settings together, `n`.

    For m settings of n_i seeds each, whose variances over seeds are pooled into s² with f = sum (n_i - 1) degrees of freedom,

        half-width = t(f) s sqrt(sum 1 / n_i) / m

    which for one setting is Student's interval; nan where no setting has a second seed. The runs of one seed are averaged first:
    a run made twice is no second seed."""
    seeds = (
        results.groupby([results[by].rename("by"), "setting", "seed"], sort=False)[values]
        .mean()
        .astype(float)
    )
    settings = seeds.groupby(level=["by", "setting"], sort=False)
    n, mean, variance = settings.count(), settings.mean(), settings.var().fillna(0)
    n = n.where(n > 0)

    def total(table: pd.DataFrame) -> pd.DataFrame:
        return table.groupby(level="by", sort=False).sum()

    f = total(n - 1)
    t = pd.DataFrame(stdtrit(f.clip(lower=1).to_numpy(), 0.975), f.index, f.columns)
    half = t * (total((n - 1) * variance) / f * total(1 / n)) ** 0.5 / total(n / n)
    return (
        mean.groupby(level="by", sort=False)
        .mean()
        .join(half.add_prefix("± "))
        .assign(n=seeds.groupby(level="by").size())
    )


def summarise(results: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row a setting, best validation top-1 first: the keys, and every top-1 of `over_seeds`."""
    values = [str(column) for column in results if str(column) in MAIN or str(column).startswith("top1.")]
    values = [
        value
        for value in values
        if value in MAIN or not any(results[value].equals(results[main]) for main in MAIN)
    ]
    summary = (
        results.groupby("setting", sort=False)[keys].first().join(over_seeds(results, "setting", values))
    )
    return summary.sort_values("val_top1", ascending=False, kind="stable").reset_index(drop=True)


def is_numeric(values: pd.Series) -> bool:
    """Whether a setting's values are all finite numbers."""
    return bool(np.isfinite(pd.to_numeric(values.dropna(), errors="coerce")).all())


def effect(results: pd.DataFrame, key: str) -> float:
    """How much validation top-1 depends on a key: the range of its means over the key's values, many numbers in five bins."""
    values = results[key]
    if is_numeric(values) and values.nunique() > 8:
        values = pd.qcut(pd.to_numeric(values), 5, duplicates="drop")
    means = results.val_top1.astype(float).groupby(values, observed=True).mean()
    return float(np.nan_to_num(means.max() - means.min()))


def with_interval(mean: float, half: float) -> str:
    """`0.9660 ± 0.0021`; without an interval where there is none."""
    return "-" if np.isnan(mean) else f"{mean:.4f}" if np.isnan(half) else f"{mean:.4f} ± {half:.4f}"


def terminal(table: pd.DataFrame, summary: pd.DataFrame, keys: list[str]) -> str:
    """The counts, the best settings, and what went wrong, in lines no wider than the terminal."""
    width = shutil.get_terminal_size((160, 24)).columns
    lines = [f"{len(table)} runs: {count_by_status(table)}"]
    if len(summary):
        lines += [
            "best validation top-1 first, as nothing is selected on the test set; mean ± 95 % interval over n seeds",
            *results_lines(summary.head(LINES), keys),
        ]
    if len(summary) > LINES:
        lines.append(f"and {len(summary) - LINES} more settings, in report.html")
    for error, paths in errors(table)[:3]:
        lines.append(f"failed ({len(paths)}): {error} [{paths[0]}]")
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def results_lines(summary: pd.DataFrame, keys: list[str]) -> list[str]:
    """The results first, so that what a narrow terminal cuts off are the keys of the least effect."""
    columns: dict[str, list[str]] = {
        "val top-1": list(map(with_interval, summary.val_top1, summary["± val_top1"])),
        "test top-1": list(map(with_interval, summary.top1, summary["± top1"])),
        "n": list(map(str, summary.n)),
        **{key: list(summary[key].fillna("-")) for key in keys},
    }
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def count_by_status(table: pd.DataFrame) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(table.status).most_common())


def errors(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Each error and the paths of the runs that it ended, the most frequent first."""
    failed = table[table.error.notna()]
    paths = [(str(error), list(group)) for error, group in failed.groupby("error", sort=False).path]
    return sorted(paths, key=lambda item: -len(item[1]))
