"""Damaged files of a run: resuming names the file and what to do, and `ssl-report` reports on the rest."""

import argparse
import hashlib
import html
import io
import itertools
import json
import socket
from pathlib import Path

import pytest
import torch
import yaml

from ssl_runner.errors import UsageError
from ssl_runner.report.read import read_run
from ssl_runner.runs import checkpoint, resume, saved, schedule
from ssl_runner.runs.files import CsvLog
from tests.helpers import pretraining
from tests.test_report import Page, ssl_report, write_run

RECORD = {"status": "failed", "identity": "x", "cwd": "/", "host": socket.gethostname()}
RECORD |= {"pid": 1, "process_started": 0.0}
NUL, BINARY, FOLDER = "epoch\n\0\n", b"\x80\x02\xff\x00", None
DEEP = "[" * 20_000


def damaged_record(**fields: object) -> str:
    return json.dumps(RECORD | fields)


RECORDS = {  # run.json -> what the message says
    **dict.fromkeys(("", "{", "[]", "null", "3", DEEP), "expected a JSON object"),
    BINARY: "expected a JSON object",
    FOLDER: "expected a JSON object",
    "{}": "expected text as status",
    **{
        damaged_record(**{name: value}): f"as {name}, found {value!r}"
        for name, value in {
            "status": 3,
            "cwd": None,
            "host": ["a"],
            "identity": {},
            "pid": -5,
            "process_started": True,
            "wall_seconds": "x",
            "processes": "y",
            "starts": 1.5,
            "images": [1],
            "relation": "views",
            "schedule": [1],
            "loggers": "x",
            "started": 3,
            "loss": "x",
            "error": {"a": 1},
            "top1": 1.5,
            "val_top1": float("nan"),
        }.items()
    },
}
TABLE = "expected the table that ssl-run writes"
TABLES = dict.fromkeys((BINARY, FOLDER, "loss,epoch\n3\n"), TABLE)
TABLES["a,loss\n1,2\n"] = "line 1: expected the column epoch, found the columns a, loss"
TABLES["epoch,loss\n1,2\nx,1\n"] = "line 3: expected an integer in the column epoch, found 'x'"
TABLES["epoch,loss\n1,2,3\n"] = "line 2: expected 2 columns, found 3"
TABLES |= dict.fromkeys(("epoch\n1.5\n", "epoch\n\n", f"epoch,a\n1,{'x' * 2**18}\n"), TABLE)
YAML = "expected the YAML that ssl-run writes"
CONFIGS = dict.fromkeys(("", "- 1\n", "a: 1\n\tb: 2\n", "x: &a [*a]\n", "{", "3", BINARY, FOLDER), YAML)
OVERRIDES = dict.fromkeys(("{", "\t", "x: &a [*a]\n", BINARY, FOLDER), YAML)
DAMAGES = [
    (name, content, words)
    for name, contents in {
        "run.json": RECORDS,
        "metrics.csv": TABLES,
        "probe.csv": TABLES,
        ".hydra/config.yaml": CONFIGS,
        ".hydra/overrides.yaml": OVERRIDES,
        ".hydra/hydra.yaml": OVERRIDES | dict.fromkeys(("", "hydra: {}", "hydra: {runtime: 3}"), YAML),
    }.items()
    for content, words in contents.items()
]


def put(path: Path, content: str | bytes | None) -> None:
    """Replace a file by this content, or by a folder."""
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An unfinished run, with all files that a resume reads except a checkpoint."""
    folder = write_run(tmp_path / "runs" / "a", 0.5, 0.5, record=RECORD)
    hydra = {"runtime": {"choices": {"loss": "vicreg"}, "config_sources": []}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    return folder


def read_to_resume(folder: Path) -> None:
    """Read and repair the files of a run as a resume does."""
    resume.plan_resume(folder, ["epochs"], None)
    schedule.read_schedule(folder, saved.load(folder).epochs)
    saved.choices(folder)
    for name in ("metrics", "probe"):
        CsvLog(folder / f"{name}.csv").truncate_after(2)
    CsvLog(folder / "probe.csv").truncate_at_repeat(("epoch", "features", "probe", "eval_split"))


def test_intact_files_can_be_resumed(folder: Path) -> None:
    read_to_resume(folder)
    assert read_run(folder).problems == []


@pytest.mark.parametrize(("name", "content", "words"), DAMAGES, ids=lambda value: repr(value)[:24])
def test_damaged_file_is_named_in_one_line_by_a_resume(
    name: str, content: str | bytes | None, words: str, folder: Path
) -> None:
    put(folder / name, content)
    with pytest.raises(UsageError) as refused:
        read_to_resume(folder)
    message = str(refused.value)
    if content is None and name in ("run.json", ".hydra/overrides.yaml"):
        assert message.startswith(f"resume={folder}: expected the folder of a run")
    else:
        assert message.startswith(f"{folder / name}: expected")
        assert words in message
    assert "\n" not in message
    assert len(message) < 700


def sealed(content: bytes) -> bytes:
    """A checkpoint file with this content and its checksum."""
    return content + checkpoint.CHECKSUM_TAG + hashlib.sha256(content).hexdigest().encode()


def saved_by_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


CHECKPOINTS = {
    "a folder": (None, "no intact checkpoint"),
    "empty": (b"", "no intact checkpoint"),
    "text": (sealed(b"text"), "it is no archive of torch.save, or contains pickled objects"),
    "an object": (sealed(saved_by_torch(argparse.Namespace())), "it contains a pickled argparse.Namespace"),
    "a function": (sealed(saved_by_torch({"epoch": print})), "it contains a pickled print"),
    "a cut archive": (sealed(saved_by_torch({"epoch": 1})[:-40]), "expected a checkpoint of this run"),
    "a list": (sealed(saved_by_torch([1])), "found list"),
    "without keys": (sealed(saved_by_torch({})), "it lacks 'epoch'"),
    "of another type": (sealed(saved_by_torch({"epoch": "x"})), "invalid literal for int()"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoint_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, words = CHECKPOINTS[name]
    put(tmp_path / "checkpoint.pt", content)
    with pytest.raises(UsageError) as refused:
        schedule.next_epoch(tmp_path)
    message = str(refused.value)
    assert words in message
    assert "checkpoint.pt" in message
    assert "remove" in message
    assert "weights_only" not in message
    assert "\n" not in message


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    """Also one that lacks entries. An exhausted GPU memory stays what it is."""
    training, path = pretraining(), tmp_path / "checkpoint.pt"
    state = {
        "computed_on": training.computed_on,
        "epoch": 0,
        "step": 0,
        "seconds": 0.0,
        "sums": {},
        "times": {},
    }
    for damaged in (state, state | {"backbone": {}}, state | {"backbone": None}, state | {"sums": 3}):
        with pytest.raises(UsageError, match="expected a checkpoint of this run"), checkpoint.restoring(path):
            training.load_state_dict(damaged)
    with pytest.raises(torch.OutOfMemoryError), checkpoint.restoring(path):
        raise torch.OutOfMemoryError


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijk")
)
READABLE = {  # damaged for a resume only: ssl-report shows the other cells and rows
    ("metrics.csv", "epoch,loss\n1,2\nx,1\n"),
    ("metrics.csv", "epoch,loss\n1,2,3\n"),
    ("metrics.csv", "loss,epoch\n3\n"),
    ("metrics.csv", "epoch\n1.5\n"),
    ("metrics.csv", "epoch\n\n"),
    ("metrics.csv", BINARY),  # without an end of a line
    ("run.json", "{}"),
    ("run.json", damaged_record(cwd=None)),
}
ODD = [
    *((".hydra/config.yaml", text) for text in (BOMB, DEEP, "!!bool x", "!!timestamp x", "!!python/name:x")),
    (".hydra/overrides.yaml", "a: 1\n"),
    ("run.json", '{"status": "done", "wall_seconds": "x", "processes": "y"}'),
]


def test_report_survives_damaged_files_and_names_them(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "intact", 0.5, 0.75)
    cases = [(name, content) for name, content, _ in DAMAGES] + ODD
    named: list[str] = []
    for number, (name, content) in enumerate(cases):
        folder = write_run(tmp_path / str(number), 0.5, 0.5, gamma=number)
        put(folder / name, content)
        [*problems] = read_run(folder).problems
        lines = {line.partition(":")[0] for line in problems}
        assert lines <= {str(folder / name)}
        assert lines or (name.replace("probe", "metrics"), content) in READABLE, (name, content)
        named += problems
    monkeypatch.setattr("ssl_runner.report.figures.draw", lambda *arguments: {})  # of a hundred gammas
    code, out, err = ssl_report(monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(f"{len(cases) + 1} runs: ")
    assert "0.7500" in out
    text = (tmp_path / "report" / "report.html").read_text()
    assert Page(text).open == []
    assert named[:10] == [line for line in out.splitlines() if line in named]
    assert f"and {len(named) - 10} more damaged files" in out
    assert all(line in html.unescape(text) for line in named[:100])
