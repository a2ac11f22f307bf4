"""Loggers: they get the rows of the CSV files, continue the curve of a resumed run, and never end a run."""

import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ssl_runner.config import check
from ssl_runner.loggers import Feed, LoggedRun, Logger, feed
from ssl_runner.loggers.mlflow import MLflow
from ssl_runner.loggers.tensorboard import TensorBoard
from ssl_runner.loggers.wandb import Wandb
from ssl_runner.preemption import Preempted
from ssl_runner.runs import saved
from ssl_runner.runs.files import CsvLog, read_json
from tests.helpers import TINY, preempt_after

Curves = dict[str, list[tuple[int, float]]]  # name -> points (epoch, value)
CONFIG = OmegaConf.create({"gamma": 7, "loss": {"alpha": 0.5}, "backbone": {"widths": [8, 16]}})
PROBE = {"probe": "knn", "features": "backbone", "eval_split": "val", "n_train": 90, "selection": "k=5 (val)"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DO_NOT_TRACK", "true"), ("WANDB_MODE", "offline")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which the logger sets


# --- names of curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row", "expected"),
    [
        ("metrics", {"epoch": 3, "loss": 0.5, "rank": None, "optimum_kind": "exact"}, {"loss": 0.5}),
        ("metrics", {"epoch": 3, "step": 30, "cached": True}, {"step": 30.0}),
        ("probe", {**PROBE, "epoch": 3, "top1": 0.9, "top5": None}, {"probe/val/backbone/knn/top1": 0.9}),
        (
            "probe",
            {**PROBE, "epoch": 3, "label_share": 0.1, "draw": 2, "top1": 0.8, "top5": 1},
            {f"probe/val/backbone/knn/label_share-0.1/draw-2/top{k}": v for k, v in ((1, 0.8), (5, 1.0))},
        ),
    ],
)
def test_values_are_the_numbers_of_a_row(table: str, row: dict[str, Any], expected: dict[str, float]) -> None:
    assert feed.values(table, row) == expected


# --- back ends --------------------------------------------------------------------------------------------


def tensorboard_curves(folder: Path) -> tuple[Curves, set[str]]:
    """The curves and the pictures in the event files of a run, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    tags = events.Tags()
    assert '"gamma"' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return curves, set(tags["images"])


def mlflow_curves(folder: Path) -> tuple[Curves, set[str]]:
    client = pytest.importorskip("mlflow").MlflowClient((folder.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("ours").experiment_id
    [run] = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("/".join(folder.parts[-3:]), "FINISHED")
    assert run.data.params == {"gamma": "7", "loss.alpha": "0.5", "backbone.widths": "[8, 16]"}
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert "config.yaml" in artifacts
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    curves = {name: [(point.step, point.value) for point in points] for name, points in history.items()}
    return curves, {name.removesuffix(".png") for name in artifacts if name.endswith(".png")}


def wandb_curves(folder: Path) -> tuple[Curves, set[str]]:
    """The history in the files of the offline runs, in the order of the starts of the run."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    curves: Curves = {}
    pictures, starts = set(), sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 20
    while not proto.Record.FromString([b"", *wandb_records(starts[-1].read_bytes())][-1]).HasField("exit"):
        assert time.monotonic() < deadline
        time.sleep(0.1)  # wandb's process writes the file after `finish` has returned
    for data in (data for path in starts for data in wandb_records(path.read_bytes())):
        record = proto.Record.FromString(data)
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("ours", "/".join(folder.parts[-3:]))
            assert {item.key: item.value_json for item in record.run.config.update}["gamma"] == "7"
        row: dict[str, Any] = {}
        for item in record.history.item:
            name, *parts = item.nested_key or [item.key]
            if parts:  # a picture is a dict
                pictures.add(name)
            elif not name.startswith("_"):
                row[name] = json.loads(item.value_json)
        for name in row.keys() - {"epoch"}:
            curves.setdefault(name, []).append((row["epoch"], row[name]))
    assert len({path.stem for path in starts}) == 1  # of one id
    return curves, pictures


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of wandb's file, in the log format of LevelDB: blocks of 32 KiB hold parts of records."""
    position, record = 7, b""  # after the magic number
    while position < len(content):
        if 32768 - position % 32768 < 7:  # no header fits
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<xxxxHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the only or the last part
            yield record
            record = b""


BACK_ENDS: dict[str, tuple[Callable[[Path], Logger], Callable[[Path], tuple[Curves, set[str]]]]] = {
    "tensorboard": (lambda folder: TensorBoard(), tensorboard_curves),
    "mlflow": (lambda folder: MLflow("ours", (folder.parent / "mlruns").as_uri()), mlflow_curves),
    "wandb": (lambda folder: Wandb("ours"), wandb_curves),
}


def write_part(
    folder: Path, logger: Logger, ids: dict[str, str], epochs: range, after: int
) -> dict[str, str]:
    """One start of a run, after epoch `after`: rows of `epochs`, with time that differs between starts.

    Returns the ids.
    """
    with Feed() as feed_:
        logs = [CsvLog(folder / f"{name}.csv", feed_.listener(name)) for name in feed.TABLES]
        for log in logs:
            log.truncate_after(after)
        ids = feed_.start(logger, folder, CONFIG, ids)
        for epoch in epochs:
            logs[0].append({"epoch": epoch, "loss": 1 / epoch, "seconds": epoch + after / 8, "kind": "bound"})
            logs[1].append({"epoch": epoch, **PROBE, "top1": epoch / 8, "top5": None})
    return ids


SLOW = ("mlflow", "wandb")  # to import


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in BACK_ENDS]
)
def test_resumed_run_continues_its_curve(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second start repeats epoch 3. TensorBoard shows the rows of the CSV files, others epoch 3 twice."""
    pytest.importorskip(name)
    make, read = BACK_ENDS[name]
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("L", (9, 5), 128).save(folder / "views.png")
    ids = write_part(folder, make(folder), {}, range(1, 4), after=0)
    if name == "wandb":
        time.sleep(1)  # it names the folder of a start after the second
    assert write_part(folder, make(folder), ids, range(3, 5), after=2) == ids
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.partition(" ")[0] for line in out.splitlines()] == ["logger:"] * 2

    rows = [*range(1, 5)] if name == "tensorboard" else [1, 2, 3, 3, 4]
    curves, pictures = read(folder)
    assert curves == {
        "loss": [(epoch, pytest.approx(1 / epoch)) for epoch in rows],
        "seconds": [(epoch, epoch + (i >= len(rows) - 2) / 4) for i, epoch in enumerate(rows)],
        "probe/val/backbone/knn/top1": [(epoch, epoch / 8) for epoch in rows],
    }
    assert pictures == {"views"}


# --- failures ---------------------------------------------------------------------------------------------


class Recorded(Logger):
    """Records the calls. `fails_in`: the method that raises; `hangs_in`: the one that does not return."""

    def __init__(self, fails_in: str = "", hangs_in: str = "", error: BaseException | None = None):
        self.fails_in, self.hangs_in, self.error = fails_in, hangs_in, error or OSError("no\nnetwork")
        self.calls: list[tuple[Any, ...]] = []

    def _call(self, method: str, *arguments: Any) -> str:
        self.calls.append((method, *arguments))
        if method == self.hangs_in:
            time.sleep(3600)  # in a daemon thread
        if method == self.fails_in:
            raise self.error
        return "here"

    def start(self, run: LoggedRun) -> str:
        return self._call("start", run.is_new)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._call("log", dict(values), epoch)

    def picture(self, name: str, path: Path) -> None:
        self._call("picture", name)

    def finish(self, status: str) -> None:
        self._call("finish", status)


def end(folder: Path, logger: Logger, error: BaseException | None = None) -> None:
    """A run of one row, which ends with `error`."""
    Image.new("L", (9, 5)).save(folder / "embedding.png")
    with Feed() as feed_:
        log = CsvLog(folder / "metrics.csv", feed_.listener("metrics"))
        feed_.start(logger, folder, CONFIG, {})
        log.append({"epoch": 1, "loss": 0.5})
        if error is not None:
            raise error


METHODS = ["start", "log", "picture", "finish"]
CALLS = [("start", True), ("log", {"loss": 0.5}, 1), ("picture", "embedding"), ("finish", "done")]


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), SystemExit("no\nnetwork")], ids=["error", "exit"])
@pytest.mark.parametrize("method", METHODS)
def test_failing_logger_is_off_and_says_so_once(
    method: str, error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = Recorded(fails_in=method, error=error)
    end(tmp_path, logger)
    assert logger.calls == CALLS[: METHODS.index(method) + 1]
    assert capsys.readouterr().err == (
        f"logger recorded failed and is off: {type(error).__name__}: no network;"
        " metrics.csv and probe.csv have every row\n"
    )
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,0.5\n"


@pytest.mark.parametrize("method", METHODS)
def test_hanging_logger_delays_the_end_by_the_limit_only(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feed, "FINISH_SECONDS", 0.05)
    start = time.perf_counter()
    end(tmp_path, Recorded(hangs_in=method))
    assert time.perf_counter() - start < 5
    assert "logger recorded did not finish within 0.05 s;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(Preempted("preempted"), "preempted"), (ValueError("nan"), "failed")]
)
def test_run_that_ends_early_logs_its_status_and_no_pictures(
    error: BaseException, status: str, tmp_path: Path
) -> None:
    logger = Recorded()
    with pytest.raises(type(error)):
        end(tmp_path, logger, error)
    assert logger.calls == [*CALLS[:2], ("finish", status)]


# --- runs -------------------------------------------------------------------------------------------------


def test_run_resumes_with_another_logger(ssl_run, tmp_path: Path) -> None:
    """The first one fails. The second one gets the rows from before the resume as well, and the pictures.

    In the event files are all numbers of metrics.csv and the scores of probe.csv, in float32.
    """
    pytest.importorskip("tensorboard")
    broken = "logger._target_=tests.test_loggers.Recorded +logger.fails_in=log logger=tensorboard"
    with pytest.MonkeyPatch.context() as patch:
        preempt_after(7, patch)
        command = f"{TINY} epochs=3 probe.every=1 views.preview=true {broken} hydra.run.dir=run"
        code, _, err = ssl_run(command)
    assert (code, err.count("logger recorded failed and is off")) == (75, 1)
    code, _, err = ssl_run("resume=run logger=tensorboard")
    assert (code, err) == (0, "")
    folder = tmp_path / "run"
    assert saved.choices(folder).logger == "tensorboard"
    assert read_json(folder / "run.json")["loggers"].keys() == {"recorded", "tensorboard"}
    curves, pictures = tensorboard_curves(folder)
    assert pictures == {"views"}
    metrics = pd.read_csv(folder / "metrics.csv").set_index("epoch").select_dtypes("number")
    expected = {name: list(column.dropna().items()) for name, column in metrics.items()}
    for (split, features, probe), part in pd.read_csv(folder / "probe.csv").groupby(
        ["eval_split", "features", "probe"]
    ):
        for name in ("top1", "top5"):
            points = list(part.set_index("epoch")[name].dropna().items())
            expected[f"probe/{split}/{features}/{probe}/{name}"] = points
    assert [epoch for epoch, _ in curves["loss"]] == [1, 2, 3]
    assert curves == {
        name: [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in points]
        for name, points in expected.items()
        if points
    }


@pytest.mark.slow
def test_sweep_logs_each_job_by_itself(ssl_run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    command = f"-m {TINY} epochs=1 diagnostics.every=0 logger=tensorboard seed=0,1 hydra.sweep.dir=sweep"
    assert ssl_run(command)[::2] == (0, "")
    for job in ("0", "1"):
        [(epoch, loss)] = tensorboard_curves(tmp_path / "sweep" / job)[0]["loss"]
        assert epoch == 1
        assert loss == pytest.approx(pd.read_csv(tmp_path / "sweep" / job / "metrics.csv").loss[0], rel=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["nothing", "folder of runs"])
def test_missing_library_is_refused_before_training(
    spec: ModuleSpec | None, ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: spec)
    assert ssl_run(f"{TINY} logger=wandb") == (
        1,
        "",
        "logger=wandb: expected wandb to be installed; run pip install 'ssl_runner[wandb]'\n",
    )
    assert list(tmp_path.iterdir()) == []
