"""The table of runs: one row per run, from its files."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ssl_runner.data.skipped import printable
from ssl_runner.report.read import Row, Run

ELSEWHERE = {  # keys of run.json that other columns show, or that say nothing about the result
    *("status", "error", "traceback", "classes", "pid", "process_started", "wall_seconds", "processes"),
    *("top1", "val_top1", "relation", "loss", "skipped", "tags", "note"),
}
MAIN = ("val_top1", "top1")  # the results by which configurations are compared
NAMED_BY = ("dataset.name", "dataset.root", "dataset.files")
PROTOCOL = ("features", "probe", "selection", "train_split", "n_train", "eval_split")


def overridden_keys(runs: list[Run]) -> list[str]:
    """V, epochs, seed, and every key that any run overrides, except its names."""
    keys = dict.fromkeys(["V", "epochs", "seed", *(key for run in runs for key in run.overrides)])
    return [key for key in keys if key not in ("tags", "note")]


def runs_table(runs: list[Run], swept: list[str]) -> pd.DataFrame:
    """One row per run.

    The columns are path, status, error, method; overridden and swept keys as text; top-1; protocol; metrics;
    cost; run.json.
    """
    keys = list(dict.fromkeys([*overridden_keys(runs), *swept]))
    parts = [state, lambda run: options(run, keys), scores, protocol, metrics, cost, facts]
    groups = [[part(run) for run in runs] for part in parts]
    columns = dict.fromkeys(column for rows in groups for row in rows for column in row)  # grouped by part
    merged = [
        {name: value for row in rows for name, value in row.items()} for rows in zip(*groups, strict=True)
    ]
    return pd.DataFrame(merged, columns=list(columns))


def state(run: Run) -> Row:
    row = {"path": printable(run.path), "status": run.status, "error": error_text(run.record.get("error"))}
    row |= {"method": method(run)}
    names = {"tags": ",".join(run.tags), "note": run.record.get("note")}
    return row | {name: text for name, text in names.items() if text}


def method(run: Run) -> str:
    """The class of a run's loss, such as VICReg."""
    return run.config.get("loss._target_", "").rpartition(".")[2] or run.choices.get("loss") or "unknown"


def data_of(run: Run) -> str:
    """Text that is equal for runs on the same images and labels, of any folder."""
    return str(run.record.get("data_digest") or named_data(run))


def named_data(run: Run) -> str:
    """The options that name a run's images."""
    return ",".join(f"{key}={run.config.get(key)}" for key in NAMED_BY)


def error_text(error: object) -> str | None:
    """The error in run.json on one line, None if there is none."""
    return " ".join(str(error or "").split()) or None


def options(run: Run, keys: Sequence[str]) -> Row:
    """The run's value of each key: a group's choice, or the value in the configuration or the overrides."""
    return {key: run.choices.get(key) or run.config.get(key) or run.overrides.get(key) for key in keys}


def scores(run: Run) -> Row:
    """`top1` and `val_top1`, and the last result of every probe as top1.<split>.<features>.<probe>.

    `.<dataset>` follows for another data set, and `.labels=<share>` for a share of the labels, as the mean
    over the draws of the last probing. Without test images `top1` is None: that of run.json is the validation
    accuracy.
    """
    _, val = main_probe(run)
    top1 = None if is_untested(run) else run.record.get("top1")
    row = {"top1": top1, "val_top1": run.record.get("val_top1", val.get("top1"))}
    results: dict[str, tuple[object, dict[object, object]]] = {}  # name -> its last probing, draw -> top-1
    for probe in run.probes:
        name, probing = probe_name(run, probe), (probe.get("epoch"), probe.get("probing"))
        if results.get(name, ())[:1] != (probing,):
            results[name] = probing, {}
        results[name][1][probe.get("draw")] = probe.get("top1")
    return row | {name: mean_of(list(draws.values())) for name, (_, draws) in results.items()}


def is_untested(run: Run) -> bool:
    """Whether the run's data set has no test images."""
    return (run.record.get("images") or {}).get("test") == 0


def probe_name(run: Run, probe: Row) -> str:
    """The name of the result in a row of probe.csv. Rows without a data set are of the run's own."""
    name = f"top1.{probe.get('eval_split')}.{probe.get('features')}.{probe.get('probe')}"
    if is_elsewhere(run, probe):
        name += f".{probe['dataset']}"
    share = probe.get("label_share")
    return name if share is None else f"{name}.labels={share:g}" if isinstance(share, float) else name


def is_elsewhere(run: Run, probe: Row) -> bool:
    """Whether a row of probe.csv is about another data set than the run's."""
    return probe.get("dataset") not in (None, run.config.get("dataset.name"))


def own_probes(run: Run) -> list[Row]:
    """The rows of probe.csv about the run's own data set and all of its labels."""
    return [p for p in run.probes if not is_elsewhere(run, p) and p.get("label_share") is None]


def mean_of(values: list[object]) -> object:
    """The mean of numbers, the last value if one is missing or not a number."""
    finite = [value for value in values if isinstance(value, float)]
    return sum(finite) / len(finite) if len(finite) == len(values) else values[-1]


def main_probe(run: Run) -> tuple[Row, Row]:
    """The rows of probe.csv behind `top1` and `val_top1`.

    These are the first row of the test split, and the row of the same probe on the validation split. For data
    without test images, both are the first row of the last epoch.
    """
    probes = own_probes(run)
    test = next((row for row in probes if row.get("eval_split") == "test"), {})
    if is_untested(run) and run.status == "done" and probes:
        test = next((row for row in probes if row.get("epoch") == probes[-1].get("epoch")), {})
    same = [p for p in probes if all(p.get(key) == test.get(key) for key in ("epoch", "probe", "features"))]
    return test, next((row for row in same if row.get("eval_split") == "val"), {})


def text_or_none(value: object) -> str | None:
    return None if value is None else str(value)


def protocol(run: Run) -> Row:
    """How `top1` was measured: features, probe, selection, splits, and the relation of pretraining."""
    test, _ = main_probe(run)
    relation = run.record.get("relation") or {}
    values = {name: text_or_none(test.get(name)) for name in PROTOCOL} | {"n_train": test.get("n_train")}
    values |= {f"relation.{key}": relation.get(key) for key in ("target", "normalized", "pairs")}
    return {f"protocol.{name}": value for name, value in values.items()}


def metrics(run: Run) -> Row:
    closed_form = run.config.get("solver._target_", "").endswith(".ClosedForm") or (
        run.config.get("solver.name") == "closed_form"  # of older runs
    )
    planned = run.config.get("solver.passes" if closed_form else "epochs")
    row = {"epochs_done": run.last.get("epoch", 0), "epochs_asked": planned}
    return row | {f"metrics.{name}": value for name, value in run.last.items()}


def cost(run: Run) -> Row:
    """Wall-clock seconds, processes, seconds summed over devices, and the median images/s of an epoch."""
    wall, processes = run.record.get("wall_seconds"), run.record.get("processes") or 1
    rate = run.rate[np.isfinite(run.rate)]
    seconds = None if wall is None else wall * processes
    row = {"wall_seconds": wall, "processes": processes, "device_seconds": seconds}
    return row | {"images_per_s": np.median(rate) if len(rate) else None}


def facts(run: Run) -> Row:
    """The rest of run.json as run.<name>: commit, versions, device, numbers of images, and so on."""
    rest = {key: value for key, value in run.record.items() if key not in ELSEWHERE}
    nested = [(key, value if isinstance(value, dict) else {"": value}) for key, value in rest.items()]
    return {
        f"run.{key}.{name}".rstrip("."): value for key, values in nested for name, value in values.items()
    }


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of finished runs with a top-1, if only of ssl-probe; runs without labels have none."""
    return table[(table.status == "done") & table[top1_columns(table)].notna().any(axis=1)]


def top1_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a table that hold a top-1: MAIN, and the result of every probe."""
    return [column for column in map(str, table) if column in MAIN or column.startswith("top1.")]


def count_by_status(table: pd.DataFrame) -> str:
    return ", ".join(f"{n:,} {status}" for status, n in Counter(table.status).most_common())


def errors(table: pd.DataFrame) -> list[tuple[str, list[int]]]:
    """Each error with the rows of the runs it ended, most frequent first."""
    failed = table[table.error.notna()]
    rows = [(str(error), list(group)) for error, group in failed.groupby("error", sort=False).groups.items()]
    return sorted(rows, key=lambda item: -len(item[1]))
