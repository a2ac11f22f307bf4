"""ssl-report: tables, plots and page agree with the files of runs in any state."""

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from ssl_runner.errors import UsageError
from ssl_runner.report import cli, configurations, figures, label_free, page, tables
from ssl_runner.report.comparisons import Comparison, compare
from ssl_runner.report.figures.heat import heat
from ssl_runner.report.figures.options import by_option
from ssl_runner.report.read import Run, canonical_value, read_run, read_runs
from tests.helpers import TINY, run_script

METRICS = "epoch,step,loss,images_per_s,optimum_kind\n1,3,9.5,100.0,\n2,6,7.5,300.0,exact\n"
PROBE = "epoch,probe,features,train_split,eval_split,selection,n_train,top1,top5,seconds\n"


def write_run(
    folder: Path,
    top1: float | None = None,
    val_top1: float | None = None,
    status: str = "done",
    metrics: str = METRICS,
    choices: dict | None = None,
    overrides: tuple[str, ...] = (),
    record: dict | None = None,
    **config: object,
) -> Path:
    """Write a run folder as ssl-run does. Every option in `config` (__ for a dot) is overridden unless
    `overrides` are given."""
    (folder / ".hydra").mkdir(parents=True)
    nested: dict = {
        "V": 2,
        "epochs": 2,
        "seed": 0,
        "loss": {"_target_": "ssl_runner.loss.VICReg"},
        "optimizer": {"lr": 0.002},
    }
    for key, value in config.items():
        group, _, name = key.rpartition("__")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    lines = list(overrides) or [
        f"{key.replace('__', '.')}={canonical_value(value)}" for key, value in config.items()
    ]
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(nested))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(lines))
    hydra = {"hydra": {"runtime": {"choices": {"loss": "vicreg", "dataset": "mnist5k", **(choices or {})}}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    about: dict = {
        "status": status,
        "wall_seconds": 10.0,
        "git_commit": "abc",
        "versions": {"torch": "2.9"},
        "device": "cpu",
    }
    about |= {
        "relation": {"target": "ssl_runner.relation.builders.FromViews", "normalized": False, "pairs": None}
    }
    if top1 is not None:
        about |= {"top1": top1, "val_top1": val_top1}
    (folder / "run.json").write_text(json.dumps(about | (record or {})))
    (folder / "metrics.csv").write_text(metrics)
    probes = [
        ("linear", "backbone", "val", val_top1),
        ("linear", "backbone", "test", top1),
        ("knn", "pixels", "test", 0.25),
    ]
    rows = [
        f"2,{probe},{features},train,{split},l2=0.1 (val),180,{score},,0.1\n"
        for probe, features, split, score in probes
    ]
    (folder / "probe.csv").write_text(PROBE + "".join(rows if top1 is not None else []))
    return folder


def make_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The table of runs, the summary and the swept keys of runs that form one comparison."""
    runs = read_runs([folder], without=folder / "report")
    table, [part] = compare(runs)
    return table, part.summary, part.keys


def comparison(folder: Path) -> Comparison:
    """The only comparison of the runs in a folder."""
    [part] = compare(read_runs([folder], without=folder / "report"))[1]
    return part


def ssl_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """The console script: exit code, standard output, standard error."""
    return run_script(cli.main, list(map(str, words)), monkeypatch, capsys)


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without content, since rendering takes most of the time of a report."""
    monkeypatch.setattr(figures, "saved", lambda picture: {"png": b"", "svg": b""})


class Page(HTMLParser):
    """Parses a page: its tags, the targets it would fetch, and whether tags are balanced."""

    VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in self.VOID else []
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.targets += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_runs_table_row_matches_files(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.5, 0.625, gamma=5.0, record={"processes": 4, "identity": "f00", "starts": 2})
    write_run(
        tmp_path / "b",
        0.75,
        0.5,
        choices={"loss": "simclr"},
        overrides=("loss=simclr", "+optimizer.lr=1e-3"),
        optimizer__lr=0.001,
    )
    table, _, _ = make_tables(tmp_path)
    a, b = table.to_dict("records")
    assert (a["path"], a["status"], a["top1"], a["val_top1"]) == (str(tmp_path / "a"), "done", 0.5, 0.625)
    assert (a["gamma"], a["optimizer.lr"], a["loss"], a["V"], a["seed"]) == (
        "5",
        "0.002",
        "vicreg",
        "2",
        "0",
    )  # not overridden
    assert (b["optimizer.lr"], b["loss"]) == ("0.001", "simclr")
    assert pd.isna(b["gamma"])
    assert (a["top1.test.backbone.linear"], a["top1.val.backbone.linear"], a["top1.test.pixels.knn"]) == (
        0.5,
        0.625,
        0.25,
    )
    assert (a["protocol.probe"], a["protocol.features"], a["protocol.eval_split"]) == (
        "linear",
        "backbone",
        "test",
    )
    assert (a["protocol.selection"], a["protocol.n_train"]) == ("l2=0.1 (val)", 180)
    assert (a["protocol.relation.target"], a["protocol.relation.normalized"]) == (
        "ssl_runner.relation.builders.FromViews",
        False,
    )
    assert (a["epochs_done"], a["epochs_asked"], a["metrics.loss"], a["metrics.optimum_kind"]) == (
        2,
        "2",
        7.5,
        "exact",
    )
    assert (a["wall_seconds"], a["processes"], a["device_seconds"], a["images_per_s"]) == (
        10.0,
        4,
        40.0,
        200.0,
    )
    assert (b["processes"], b["device_seconds"]) == (1, 10.0)  # of a run that does not say
    assert (a["run.identity"], a["run.starts"], a["run.versions.torch"], a["run.git_commit"]) == (
        "f00",
        2,
        "2.9",
        "abc",
    )


def test_summary_intervals_match_scipy_and_rows_are_sorted_by_validation(tmp_path: Path) -> None:
    top1 = {1: [0.5, 0.6, 0.9], 5: [0.9, 0.8, 0.85]}
    val = {1: [0.9, 0.92, 0.91], 5: [0.7, 0.6, 0.65]}
    for gamma in top1:
        for seed in range(3):
            write_run(
                tmp_path / f"{gamma}-{seed}", top1[gamma][seed], val[gamma][seed], gamma=gamma, seed=seed
            )
    _, summary, keys = make_tables(tmp_path)
    assert keys == ["gamma"]
    assert list(summary.gamma) == ["1", "5"]
    assert list(summary.n) == [3, 3]
    for row in summary.to_dict("records"):
        for column, values in (("top1", top1[int(row["gamma"])]), ("val_top1", val[int(row["gamma"])])):
            low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            np.testing.assert_allclose(
                [row[column] - row[f"± {column}"], row[column] + row[f"± {column}"]], [low, high]
            )


def test_summary_averages_repeated_seeds_and_omits_interval_below_three(tmp_path: Path) -> None:
    """Without repeated seeds, gamma=1 would have four; gamma=3 has three seeds that change nothing."""
    for i, (seed, top1) in enumerate([(0, 0.5), (0, 0.7), (1, 0.8), (1, 0.8)]):
        write_run(tmp_path / str(i), top1, top1, seed=seed, gamma=1)
    for seed, top1 in enumerate((0.1, 0.15, 0.2)):
        write_run(tmp_path / f"2-{seed}", top1, top1, seed=seed, gamma=2)
        write_run(tmp_path / f"3-{seed}", 0.05, 0.05, seed=seed, gamma=3)
    _, summary, _ = make_tables(tmp_path)
    assert list(summary.n) == [2, 3, 3]
    np.testing.assert_allclose(summary.top1, [0.7, 0.15, 0.05])
    half = stats.t.ppf(0.975, 2) * 0.05 / np.sqrt(3)
    np.testing.assert_allclose(summary["± top1"], [np.nan, half, np.nan])
    assert summary["± top1.test.pixels.knn"].isna().all()  # 0.25 in each run


@pytest.mark.parametrize(
    ("mean", "half", "text", "percent"),
    [
        (0.1, np.nan, "0.1000", "10.00"),
        (0.966, 0.0021, "0.9660 ± 0.0021", "96.60 ± 0.21"),
        (0.525, 1.5883, "0.5250 (0.0000 to 1.0000)", "52.50 (0.00 to 100.00)"),
        (0.995, 0.007, "0.9950 (0.9880 to 1.0000)", "99.50 (98.80 to 100.00)"),
        (np.nan, np.nan, "-", "-"),
    ],
)
def test_interval_of_an_accuracy_stays_within_0_and_1(mean, half, text, percent) -> None:
    assert configurations.with_interval(mean, half) == text
    assert configurations.with_interval(mean, half, unit=0.01) == percent


def test_over_seeds_pools_variance_of_configurations() -> None:
    rng = np.random.default_rng(0)
    samples = {setting: rng.normal(setting, 1, n) for setting, n in enumerate((3, 5, 1))}
    rows = [
        ("x", setting, str(seed), value)
        for setting, sample in samples.items()
        for seed, value in enumerate(sample)
    ]
    [row] = configurations.over_seeds(
        pd.DataFrame(rows, columns=["key", "configuration", "seed", "top1"]), "key", ["top1"]
    ).to_dict("records")
    squares = sum(((sample - sample.mean()) ** 2).sum() for sample in samples.values())
    error = np.sqrt(squares / 6 * (1 / 3 + 1 / 5 + 1)) / 3
    np.testing.assert_allclose(row["top1"], np.mean([sample.mean() for sample in samples.values()]))
    np.testing.assert_allclose(row["± top1"], stats.t.ppf(0.975, 6) * error)
    assert row["n"] == 9


def test_swept_keys_exclude_seeds_and_hydra_options(tmp_path: Path) -> None:
    for i, (gamma, seed) in enumerate([(1, 0), (1.0, 1), (5, 0), (5, 1)]):
        overrides = (
            f"gamma={gamma}",
            f"seed={seed}",
            f"dataset.split_seed={seed}",
            f"hydra.run.dir=x{i}",
            f"resume=x{i}",
            f"logger={'wandb' if seed else 'none'}",
        )
        write_run(
            tmp_path / str(i),
            0.5,
            0.5,
            overrides=overrides,
            gamma=gamma,
            seed=seed,
            resume=f"x{i}",
            logger__project=f"x{i}",
            dataset__split_seed=seed,
        )
    _, summary, keys = make_tables(tmp_path)
    assert keys == ["gamma"]
    assert list(summary.n) == [2, 2]


def test_swept_keys_include_independent_split_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        for split in (0, 1):
            write_run(tmp_path / f"{seed}-{split}", 0.5, 0.5, seed=seed, dataset__split_seed=split)
    assert make_tables(tmp_path)[2] == ["dataset.split_seed"]


def test_swept_keys_include_changed_default(tmp_path: Path) -> None:
    for i, decay in enumerate([0.0, 0.0, 0.1]):
        write_run(
            tmp_path / str(i), 0.5, 0.5, overrides=(f"seed={i}",), seed=i, optimizer__weight_decay=decay
        )
    _, summary, keys = make_tables(tmp_path)
    assert keys == ["optimizer.weight_decay"]
    assert sorted(summary.n) == [1, 2]


@pytest.mark.usefixtures("unrendered")
def test_report_reads_torn_missing_and_damaged_files(tmp_path: Path) -> None:
    write_run(tmp_path / "torn", status="running", metrics=METRICS + "3,9,5.")
    assert read_run(tmp_path / "torn").last["epoch"] == 2
    for i, name in enumerate(
        [".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "metrics.csv", "probe.csv"]
    ):
        for state, content in (
            ("missing", None),
            ("empty", b""),
            ("broken", b"a: [1,\n\xff\x00{"),
            ("odd", b"- 1\n"),
        ):
            file = write_run(tmp_path / f"{i}{state}", 0.5, 0.5, gamma=1, seed=i) / name
            file.unlink() if content is None else file.write_bytes(content)
    for i, content in enumerate([None, "", "{", "[]", "null"]):
        file = write_run(tmp_path / f"r{i}", 0.5, 0.5) / "run.json"
        file.unlink() if content is None else file.write_text(content)
    (tmp_path / "bare" / ".hydra").mkdir(parents=True)
    runs = read_runs([tmp_path], without=tmp_path / "report")
    assert len(runs) == 1 + 20 + 5 + 1
    table = tables.runs_table(runs, [])
    assert dict(table.status.value_counts()) == {"done": 20, "unknown": 6, "running": 1}
    assert "20 done" in cli.report(runs, tmp_path / "report", "title")


def test_report_handles_result_without_validation(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", 0.5)
    (folder / "probe.csv").unlink()
    told = cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", "title")
    assert told.splitlines()[3].split() == ["-", "0.5000", "1"]


@pytest.mark.usefixtures("unrendered")
def test_report_removes_plots_of_earlier_report(tmp_path: Path) -> None:
    for i in range(3):
        write_run(tmp_path / str(i), 0.5, 0.5, gamma=i // 2, V=i % 2)
    out = tmp_path / "report"
    cli.report(read_runs([tmp_path], out), out, "title")
    cli.report(read_runs([tmp_path / "0"], out), out, "title")
    assert sorted(file.name for file in out.iterdir()) == [
        "configurations.csv",
        "curves.png",
        "curves.svg",
        "report.html",
        "runs.csv",
    ]


@pytest.mark.usefixtures("unrendered")
def test_report_keeps_files_that_it_has_not_written(tmp_path: Path) -> None:
    for i in range(3):
        write_run(tmp_path / str(i), 0.5, 0.5, gamma=i // 2, V=i % 2)
    out = tmp_path / "mine"
    out.mkdir()
    for name in ("heat-2.svg", "spectra_png"):
        (out / name).write_text("mine")
    cli.report(read_runs([tmp_path], out), out, "title")
    assert {"heat-2.svg", "spectra_png", "report.html"} <= {file.name for file in out.iterdir()}
    cli.report(read_runs([tmp_path], out), out, "title")
    assert (out / "spectra_png").read_text() == "mine"
    (out / "report.html").unlink()
    with pytest.raises(UsageError, match=r"--out=.*: expected a folder without .*curves\.png, .*another one"):
        cli.report(read_runs([tmp_path], out), out, "title")


def test_report_of_one_run_counts_it_in_the_singular(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.5, 0.5)
    told = cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", "title")
    assert told.startswith("1 run: 1 done\n")
    assert "<p>1 run: 1 done. " in (tmp_path / "report" / "report.html").read_text()


def test_report_without_finished_run_lists_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # lines are cut at the terminal's width
    write_run(tmp_path / "a", status="failed", metrics="", record={"error": "Boom:\n it broke"})
    write_run(tmp_path / "b", status="preempted")
    told = cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", "title")
    assert told.splitlines()[:2] == [
        "2 runs: 1 failed, 1 preempted",
        f"failed (1): Boom: it broke [{tmp_path / 'a'}]",
    ]


def test_page_escapes_content_of_runs(tmp_path: Path) -> None:
    evil = "</td><script>alert('x')</script><img src=http://evil.example/x>"
    write_run(tmp_path / "a", 0.5, 0.5, gamma=1, name=evil, record={"host": evil})
    write_run(tmp_path / "b", 0.6, 0.6, gamma=2, name=f"$\\frac{evil}")
    write_run(tmp_path / "c", status="failed", gamma=3, name="c", record={"error": evil, "traceback": evil})
    cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", evil)
    text = (tmp_path / "report" / "report.html").read_text()
    parsed = Page(text)
    assert parsed.tags.count("script") == 1
    assert all(target.startswith(("data:", "../")) for target in parsed.targets)
    assert "<script>alert" not in text
    for file in (tmp_path / "report").glob("*.svg"):
        ElementTree.fromstring(file.read_text())


def test_page_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    for i in range(8):
        write_run(
            tmp_path / str(i), 0.5 + 0.01 * i, 0.6, gamma=i % 4, optimizer__lr=10.0 ** -(i // 4), seed=0
        )
    cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", "a & b")
    text = (tmp_path / "report" / "report.html").read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.tags.count("img") == 3
    assert all(target.startswith(("../", "data:")) for target in parsed.targets)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "<title>ssl-report: a &amp; b</title>" in text


def test_page_shows_embeddings_of_first_runs(tmp_path: Path) -> None:
    for i in range(page.MAX_MAPS + 2):
        folder = write_run(tmp_path / f"run <{i}>", 0.5, 0.5, seed=i)
        for name in page.EMBEDDING_ALTS:
            (folder / name).write_bytes(f"{name} {i}".encode())
    (tmp_path / "run <0>" / "neighbors.png").unlink()
    write_run(tmp_path / "run without pictures", 0.5, 0.5)
    cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", "title")
    text = (tmp_path / "report" / "report.html").read_text()
    shown = Page(text)
    assert shown.open == []
    pictures = [target for target in shown.targets if target.startswith("data:")]
    contents = [base64.b64decode(target.rpartition(",")[2]).decode("latin-1") for target in pictures]
    names = ("embedding.png", "neighbors.png")
    expected = ["embedding.png 0", *(f"{name} {i}" for i in range(1, page.MAX_MAPS) for name in names)]
    assert contents[-len(expected) :] == expected
    assert "The 12 runs with the highest validation top-1 on their data set are shown; 2 more" in text


@pytest.mark.usefixtures("unrendered")
def test_page_lists_options_shared_by_all_runs(tmp_path: Path) -> None:
    for gamma in (1, 2):
        write_run(tmp_path / str(gamma), 0.5, 0.5, gamma=gamma, epochs=7)
    cli.report(read_runs([tmp_path], tmp_path / "report"), tmp_path / "report", "title")
    [shared] = re.findall(
        "Options shared by all runs: (.*)</p>", (tmp_path / "report/report.html").read_text()
    )
    assert re.findall("<code>(.*?)</code>", shared) == ["V=2", "epochs=7"]


def test_plots_show_means_of_each_loss(tmp_path: Path) -> None:
    for seed in range(3):
        for gamma, lr, loss in (
            (1, 0.1, "VICReg"),
            (100, 0.1, "VICReg"),
            (100, 0.2, "VICReg"),
            (1, 0.1, "SimCLR"),
        ):
            top1 = {1: 0.5, 100: 0.7}[gamma] + 0.1 * seed
            config = {"gamma": gamma, "optimizer__lr": lr, "loss": {"_target_": f"ssl_runner.loss.{loss}"}}
            words = (f"gamma={gamma}", f"optimizer.lr={lr}", f"seed={seed}")
            write_run(
                tmp_path / f"{gamma}{lr}{loss}{seed}", top1, top1 / 2, overrides=words, seed=seed, **config
            )
    part = comparison(tmp_path)
    picture = by_option(part)
    assert picture is not None
    losses, *panels = picture.figure.axes
    assert [label.get_text() for label in losses.get_xticklabels()] == ["SimCLR", "VICReg"]
    np.testing.assert_allclose(losses.containers[1][0].get_xydata()[:, 1], [60, 200 / 3 + 20 / 3])
    [gammas] = [ax for ax in panels if ax.get_title() == "VICReg: gamma"]
    assert len(panels) == 2  # one for each option of VICReg; SimCLR has one configuration
    assert gammas.get_xscale() == "log"
    val, test = (container[0] for container in gammas.containers)
    np.testing.assert_allclose(val.get_xydata(), [[1, 30], [100, 40]])
    np.testing.assert_allclose(test.get_xydata(), [[1, 60], [100, 80]])
    assert val.get_linestyle() == "None"  # gamma=1 has one learning rate, gamma=100 two
    picture = heat(part)
    assert picture is not None
    assert picture.notes == ["Not in the map: 1 of SimCLR, in which fewer than two options differ."]
    cells = picture.figure.axes[1].collections[0].get_array()
    assert cells is not None
    np.testing.assert_allclose(np.sort(cells.filled(np.inf), axis=None), [60, 80, 80, np.inf])


def test_effect_is_range_of_means() -> None:
    results = pd.DataFrame(
        {"a": ["1", "2", "1", "2"], "b": ["x", "x", "y", "y"], "val_top1": [0.1, 0.2, 0.5, 0.6]}
    ).assign(method="VICReg")
    assert configurations.effect(results, "a") == pytest.approx(0.1)
    assert configurations.effect(results, "b") == pytest.approx(0.4)
    assert configurations.is_numeric(results.a)
    assert not configurations.is_numeric(results.b)
    assert not configurations.is_numeric(pd.Series(["1", "null"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected a folder; give folders that contain runs, such as outputs"),
        (["empty"], "empty: expected runs, found none; give folders that ssl-run wrote to, such as outputs"),
        (
            ["runs", "--out", "file"],
            "--out=file: cannot write there (File exists); give a writable folder",
        ),
    ],
)
def test_ssl_report_rejects_bad_input_in_one_line(
    tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_run(tmp_path / "runs" / "a", 0.5, 0.5)
    assert ssl_report(monkeypatch, capsys, *arguments) == (1, "", message + "\n")


def test_read_runs_returns_each_run_once_in_natural_order(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        write_run(tmp_path / "sweep" / str(i), 0.5, 0.5)
    runs: list[Run] = read_runs([tmp_path, tmp_path / "sweep"], without=tmp_path / "report")
    assert [run.path.name for run in runs] == ["1", "9", "10"]
    assert len(read_runs([tmp_path], without=tmp_path / "sweep" / "9")) == 2
    assert len(read_runs([tmp_path], without=tmp_path)) == 3  # written among the runs


def test_report_of_real_sweep_matches_its_output(ssl_run, tmp_path: Path, monkeypatch, capsys) -> None:
    code, out, _ = ssl_run(f"-m loss=vicreg,simclr {TINY} probe.every=1")
    assert code == 0
    done = [float(value) for value in re.findall(r"^top1=(\S+)", out, re.MULTILINE)]
    code, out, err = ssl_report(monkeypatch, capsys, "outputs")
    assert (code, err) == (0, "")
    assert out.startswith("2 runs: 2 done\n")
    assert "written to outputs/report: configurations.csv, curves.png" in out
    table = pd.read_csv(tmp_path / "outputs" / "report" / "runs.csv")
    np.testing.assert_allclose(table.top1, done, atol=1e-4)
    assert list(table.loss) == ["vicreg", "simclr"]
    assert (
        table[["metrics.rank", "run.versions.torch", "images_per_s", "protocol.selection"]]
        .notna()
        .all(axis=None)
    )
    assert ssl_report(monkeypatch, capsys, "outputs")[0] == 0  # again, over what it wrote


@pytest.mark.slow
def test_report_of_a_thousand_runs_stays_small(tmp_path: Path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)
    for i in range(1000):
        top1 = float(rng.uniform())
        write_run(
            tmp_path / "runs" / str(i),
            top1,
            top1,
            gamma=float(rng.uniform()),
            optimizer__lr=float(rng.uniform()),
            seed=i % 3,
        )
    code, out, err = ssl_report(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    assert out.startswith("1,000 runs: 1,000 done\n")
    assert (tmp_path / "report" / "report.html").stat().st_size < 3e6


def test_ssl_report_checks_arguments_before_it_imports_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; from ssl_runner.report.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert exit.code == 1 and 'matplotlib' not in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env, capture_output=True)


def test_ssl_report_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.5, 0.5)
    code = (
        "import sys; from ssl_runner.report.cli import main; main();"
        " assert not {'torch', 'hydra'} & set(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env, capture_output=True)


def test_heat_map_bins_options_with_many_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gamma, top1 = rng.uniform(1, 100, 60), rng.uniform(0, 1, 60)
    for i, name in enumerate(["a", "b"] * 30):
        write_run(tmp_path / str(i), top1[i], top1[i], gamma=float(gamma[i]), name=name)
    picture = heat(comparison(tmp_path))
    assert picture is not None
    axes = picture.figure.axes[1]
    cells = axes.collections[0].get_array()
    bins = np.clip(np.searchsorted(np.quantile(gamma, np.linspace(0, 1, 7)), gamma, side="left") - 1, 0, 5)
    expected = np.array(
        [[100 * top1[(bins == i) & (np.arange(60) % 2 == j)].mean() for j in range(2)] for i in range(6)]
    )
    transposed = axes.get_ylabel() == "name"
    np.testing.assert_allclose(cells.filled(np.nan), expected.T if transposed else expected)


@pytest.mark.parametrize(
    "solver",
    [{"name": "closed_form"}, {"_target_": "ssl_runner.theory.solver.ClosedForm"}],
    ids=["old", "new"],
)
def test_planned_epochs_of_closed_form_are_its_passes(tmp_path: Path, solver: dict) -> None:
    write_run(tmp_path / "a", 0.5, 0.5, epochs=7, solver=solver | {"passes": 3})
    assert list(make_tables(tmp_path)[0].epochs_asked) == ["3"]


def test_effect_ignores_runs_without_the_key_and_separates_close_numbers() -> None:
    gamma = [str(1000 + i / 100) for i in range(10)]
    top1 = [0.1] * 2 + [0.2] * 2 + [0.3] * 2 + [0.4] * 2 + [0.5] * 2
    results = pd.DataFrame({"gamma": [*gamma, None], "val_top1": [*top1, 0.9], "method": "VICReg"})
    assert configurations.effect(results, "gamma") == pytest.approx(0.4)


def write_measured(folder: Path, seed: int, rank: float, top1: float, alpha: float, **config: object) -> Path:
    metrics = f"epoch,loss,effective_rank,alpha_req\n2,{-rank},{rank},{alpha}\n"
    return write_run(folder, top1, top1, metrics=metrics, seed=seed, **config)


def test_correlations_match_scipy_over_configurations(tmp_path: Path) -> None:
    """Means over two seeds; data sets and losses of other options are not mixed. Notes are on methods."""
    rng, expected = np.random.default_rng(0), {}
    for data, loss_varies in (("a", False), ("b", True)):
        values = rng.random((6, 2, 3))  # configuration, seed, measures
        for lr, seed in np.ndindex(6, 2):
            rank, top1, alpha = values[lr, seed].tolist()
            options = {"dataset__name": data, "optimizer__lr": lr + 1}
            options |= {"loss__gamma": lr} if loss_varies else {}
            write_measured(tmp_path / f"{data}{lr}{seed}", seed, rank, top1, 2 * alpha, **options)
        means = values.mean(1)
        distance = -np.abs(2 * values[..., 2] - 1).mean(1)
        expected[data] = [stats.spearmanr(x, means[:, 1]).statistic for x in (means[:, 0], distance)]
    comparisons = compare(read_runs([tmp_path], without=tmp_path / "report"))[1]
    rows, notes = label_free.correlations(comparisons)
    rows = rows.set_index(rows["data set"].str[0])
    assert rows.n.tolist() == [6, 6]
    for data, (rank, alpha) in expected.items():
        np.testing.assert_allclose(rows.effective_rank[data], rank)
        np.testing.assert_allclose(rows["-|alpha_req - 1|"][data], alpha)
    np.testing.assert_allclose(rows["-loss"]["a"], expected["a"][0])
    assert np.isnan(rows["-loss"]["b"])
    assert notes == []


def test_correlations_are_per_images_with_a_note_on_several_methods(tmp_path: Path) -> None:
    """Two lists of one folder are two data sets; the same images under two roots are one."""
    for run in range(16):
        images, root = f"{run % 2}.csv", f"root{run % 3}"
        options = {"dataset__name": "folder", "dataset__files": images, "optimizer__lr": run}
        loss = {"_target_": f"ssl_runner.loss.{'SimCLR' if run == 1 else 'VICReg'}"}
        options |= {"dataset__root": root, "loss": loss}
        folder = write_measured(tmp_path / str(run), 0, run, run / 20, 1.0, **options)
        record = json.loads((folder / "run.json").read_text()) | {"data_digest": images}
        (folder / "run.json").write_text(json.dumps(record))
    comparisons = compare(read_runs([tmp_path], without=tmp_path / "report"))[1]
    rows, notes = label_free.correlations(comparisons)
    assert rows.n.tolist() == [8, 8]
    assert [note.rpartition("images:")[2] for note in notes] == [f" {label_free.SEVERAL_LOSSES}"]


@pytest.mark.usefixtures("unrendered")
def test_report_states_why_there_is_no_correlation(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for lr in (1, 2, 3):
        write_measured(tmp_path / f"{lr}", 0, lr, lr / 10, 1.0, dataset__name="a", optimizer__lr=lr)
    _, text, _ = ssl_report(monkeypatch, capsys, tmp_path)
    note = "a: linear on backbone, test images: 3 configurations with such measures; at least 4 needed."
    assert note in text
    assert not re.search("^data set ", text, re.MULTILINE)  # no table of dashes
    assert note in (tmp_path / "report" / "report.html").read_text()
    write_measured(tmp_path / "4", 0, 0.5, 0.4, 1.0, dataset__name="a", optimizer__lr=4)
    _, text, _ = ssl_report(monkeypatch, capsys, tmp_path)
    assert "at least 4 needed" not in text
    assert re.search(r"^a.* +test +4 +-0\.20 +-", text, re.MULTILINE)  # equal alpha: no correlation


def add_probes(folder: Path, *rows: tuple[str, str, str, float]) -> None:
    """Append rows of ssl-probe on another data set to probe.csv: data set, features, split, top-1."""
    frame = pd.read_csv(folder / "probe.csv")
    columns = ["dataset", "features", "eval_split", "top1"]
    added = pd.DataFrame(rows, columns=columns).assign(epoch=2, probe="linear", probing="t", label_share=0.1)
    pd.concat([frame, added]).to_csv(folder / "probe.csv", index=False)


def test_results_of_ssl_probe_alone_are_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    for seed in range(2):
        folder = write_run(tmp_path / str(seed), seed=seed, lr=seed, dataset__name="photos")
        add_probes(folder, ("labA", "backbone", "val", 0.5), ("labA", "backbone", "test", 0.75))
    code, out, err = ssl_report(monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, "")
    assert "test backbone.linear.labA.labels=0.1" in out
    assert "0.7500" in out
    assert "results of ssl-probe on other images; runs.csv has all" in out
    text = (tmp_path / "report" / "report.html").read_text()
    assert "test backbone.linear.labA.labels=0.1" in text
    assert ">75.00" in text


def test_page_of_finished_runs_without_a_result_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "a")
    assert ssl_report(monkeypatch, capsys, tmp_path)[0] == 0
    text = (tmp_path / "report" / "report.html").read_text()
    assert "No finished run has a top-1" in text
    assert "No run has finished yet" not in text


def test_summary_leaves_out_the_main_result_by_name_and_not_by_value(tmp_path: Path) -> None:
    add_probes(write_run(tmp_path / "a", 0.5, 0.625), ("labA", "backbone", "val", 0.625))
    _, summary, _ = make_tables(tmp_path)
    others = [name for name in summary if name.startswith("top1.")]
    assert others == ["top1.test.pixels.knn", "top1.val.backbone.linear.labA.labels=0.1"]


def test_report_of_many_result_columns_prints_no_warning(tmp_path: Path, recwarn) -> None:
    rows = [(f"lab{i}", "backbone", "val", i / 100) for i in range(60)]
    add_probes(write_run(tmp_path / "a", 0.5, 0.625), *rows)
    make_tables(tmp_path)
    assert [warning.message for warning in recwarn] == []


def write_untested(folder: Path, val_top1: float, **config: object) -> Path:
    """Write a run without test images: `top1` in run.json repeats the validation accuracy."""
    record = {"images": {"pretrain": 90, "train": 90, "val": 10, "test": 0}}
    write_run(folder, val_top1, val_top1, record=record, **config)
    row = f"2,linear,backbone,train,val,l2=0.1 (val),90,{val_top1},,0.1\n"
    (folder / "probe.csv").write_text(PROBE + row)
    return folder


def test_run_without_test_images_has_no_test_top1(tmp_path: Path, monkeypatch, capsys) -> None:
    write_untested(tmp_path / "a", 0.75, gamma=1.0)
    table, summary, _ = make_tables(tmp_path)
    assert table.top1.isna().all()
    assert table["protocol.eval_split"].tolist() == ["val"]
    assert (summary.val_top1.tolist(), summary.top1.isna().tolist()) == ([0.75], [True])
    out = ssl_report(monkeypatch, capsys, tmp_path, "--out", tmp_path / "report")[1]
    assert [re.split(" {2,}", line) for line in out.splitlines()[2:4]] == [
        ["val top-1", "test top-1", "n"],
        ["0.7500", "-", "1"],
    ]


def test_plots_omit_test_of_runs_without_test_images(tmp_path: Path) -> None:
    for i, (gamma, name) in enumerate([(1, "a"), (2, "a"), (1, "b"), (2, "b")]):
        write_untested(tmp_path / "runs" / str(i), 0.1 * i, gamma=gamma, name=name)
    part = comparison(tmp_path / "runs")
    by_key, map_ = by_option(part), heat(part)
    assert by_key is not None
    assert map_ is not None
    assert [text.get_text() for text in by_key.figure.legends[0].get_texts()] == ["validation"]
    assert [ax.get_title() for ax in map_.figure.axes if ax.get_title()] == ["VICReg: validation"]

    write_run(tmp_path / "runs" / "tested", 0.3, 0.9, gamma=1, name="c")  # another protocol
    parts = compare(read_runs([tmp_path / "runs"], tmp_path / "report"))[1]
    assert [(part.title, len(part.summary)) for part in parts] == [
        ("mnist5k: linear on backbone, 10 val images", 4),
        ("mnist5k: linear on backbone, test images", 1),
    ]


def test_report_shows_bytes_that_are_not_utf8_as_escapes(tmp_path: Path, monkeypatch, capsys) -> None:
    for i, root in enumerate(("x\udcff", "y")):
        config = {"dataset__root": root, "gamma": i}
        folder = tmp_path / "runs" / f"n\udcfe{i}"
        write_run(folder, 0.5, 0.5, record={"command": f"ssl-run {root}", "error": root}, **config)
    code, _, err = ssl_report(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    table = pd.read_csv(tmp_path / "report" / "runs.csv")
    assert table["dataset.root"].tolist() == ["x\\udcff", "y"]
    assert table["run.command"].tolist() == ["ssl-run x\\udcff", "ssl-run y"]
    assert table.path[0].endswith("n\\udcfe0")
    assert "x\\udcff" in (tmp_path / "report" / "report.html").read_text()


def test_report_of_unlabelled_runs_says_why_there_is_no_top1(tmp_path: Path, monkeypatch, capsys) -> None:
    for seed in range(2):
        write_run(tmp_path / str(seed), seed=seed, record={"top1": None, "val_top1": None, "classes": []})
    out = ssl_report(monkeypatch, capsys, tmp_path, "--out", tmp_path / "report")[1]
    assert out.splitlines()[:2] == [
        "2 runs: 2 done",
        "no top-1 for 2 done: their images have no labels; runs.csv has the losses",
    ]
    assert pd.read_csv(tmp_path / "report" / "runs.csv")["metrics.loss"].tolist() == [7.5, 7.5]


@pytest.mark.usefixtures("unrendered")
def test_report_of_labelled_runs_without_a_valid_top1_does_not_blame_the_labels(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    write_run(tmp_path / "a", record={"top1": 1.7, "classes": ["0", "1"]})
    out = ssl_report(monkeypatch, capsys, tmp_path, "--out", tmp_path / "report")[1]
    assert "no top-1 for 1 done: their run.json and probe.csv have none that is valid\n" in out
    assert "run.json: expected a number in [0, 1] as top1, found 1.7" in out
    assert "labels" not in out
    assert "its images have no labels" not in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.usefixtures("unrendered")
def test_terminal_names_losses_that_no_override_selects(tmp_path: Path, monkeypatch, capsys) -> None:
    for lr, loss in enumerate(("VICReg", "SimCLR")):
        config = {"loss": {"_target_": f"ssl_runner.loss.{loss}"}, "optimizer": {"lr": lr}}
        write_run(tmp_path / loss, 0.5, 0.5, overrides=(f"optimizer.lr={lr}",), **config)
    out = ssl_report(monkeypatch, capsys, tmp_path)[1]
    assert re.search(r"n +loss +optimizer\.lr\n", out)
    assert {"VICReg", "SimCLR"} <= set(out.split())


def test_best_prints_every_option_in_which_runs_differ(tmp_path: Path, monkeypatch, capsys) -> None:
    source = {"path": "/a folder", "schema": "file", "provider": "command-line"}
    for gamma, scores in {5: (0.5, 0.7), 25: (0.64, 0.66)}.items():
        for seed, val in enumerate(scores):
            lines = [
                "tags=[a]",
                "logger=mlflow",
                "logger.experiment=x",
                "probe.cache=false",
                "+optimizer.betas=[0.9,0.95]",
                "gamma=1",  # the last one counts
                f"gamma={gamma}",
                f"seed={seed}",
            ]
            folder = write_run(
                tmp_path / f"{gamma}-{seed}",
                top1=1 / gamma,
                val_top1=val,
                overrides=(*lines, "hydra.run.dir=x"),
                record={"cwd": str(Path.cwd()), "tags": ["a"]},
                gamma=gamma,
                seed=seed,
                beta=seed and 1,  # not on the command line, and not of the configuration of seed 0
            )
            hydra = {"hydra": {"runtime": {"config_sources": [source], "choices": {"loss": "vicreg"}}}}
            (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    code, out, err = ssl_report(monkeypatch, capsys, tmp_path, "--best", "--tag", "a")
    comment, command = out.splitlines()
    assert (code, err) == (0, "")
    assert comment == "# best of 4 by validation top-1 (test top-1 is not used): 0.7000, seeds: 1"
    assert command == "ssl-run --config-dir '/a folder' '+optimizer.betas=[0.9,0.95]' gamma=5 seed=1 beta=1"
    assert not (tmp_path / "report").exists()


def test_best_has_the_best_validation_mean_over_seeds(tmp_path: Path, monkeypatch, capsys) -> None:
    """Test top-1 and single seeds prefer the other configuration."""
    for lr, scores in {0.1: (0.5, 0.6, 0.7), 0.002: (0.64, 0.65, 0.66)}.items():
        for seed, val in enumerate(scores):
            lines = [f"optimizer.lr={lr}"] if lr == 0.1 else []
            lines += [f"alpha={('3', '3.0')[seed % 2]}"]
            write_run(
                tmp_path / f"{lr}-{seed}",
                1 - val,
                val,
                overrides=(*lines, f"seed={seed}"),
                seed=seed,
                optimizer__lr=lr,
                alpha=3.0,
            )
    _, out, _ = ssl_report(monkeypatch, capsys, tmp_path, "--best")
    assert out.splitlines()[-1] == "ssl-run alpha=3 optimizer.lr=0.002"
    assert "0.6500 ± 0.0248, seeds: 3" in out


@pytest.mark.usefixtures("unrendered")
def test_tags_and_notes_name_runs_and_separate_no_configurations(tmp_path: Path, monkeypatch, capsys) -> None:
    names = [(["a", "b"], "first, <try>"), (["b"], None), ("a", 7), (None, None)]
    for seed, (tags, note) in enumerate(names):
        given = (f"seed={seed}", f"tags={tags}", f"note={note}")
        record = {"tags": tags, "note": note}
        write_run(tmp_path / str(seed), 0.5, 0.5, overrides=given, record=record, seed=seed, tags=tags)
    table, summary, keys = make_tables(tmp_path)
    assert keys == []
    assert list(summary.n) == [4]
    assert table.tags.fillna("").tolist() == ["a,b", "b", "", ""]
    for words, expected in ((["--tag", "b"], "2 runs"), (["--tag", "b", "--tag", "a"], "1 run:")):
        code, out, _ = ssl_report(monkeypatch, capsys, tmp_path, *words)
        assert (code, out.startswith(expected)) == (0, True)
    assert "first, &lt;try&gt;" in (tmp_path / "report" / "report.html").read_text()
    code, _, err = ssl_report(monkeypatch, capsys, tmp_path, "--tag", "c")
    assert (code, err) == (1, "--tag=c: expected tags of a run, found a, b; choose from these\n")


def test_watch_repeats_until_interrupted_and_waits_for_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        write_run(tmp_path / "a", 0.5, 0.6)

    monkeypatch.setattr(cli.time, "sleep", sleep)
    code, out, err = ssl_report(monkeypatch, capsys, tmp_path, "--best", "--watch")
    assert (code, err, waits) == (0, "", [30, 30])
    assert out.index("expected runs, found none") < out.index("0.6000, seeds: 1\n")
