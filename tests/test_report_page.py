"""ssl-report: what is compared, what figures show, and the filters, links and labels of the page."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from ssl_runner.report import cli, figures
from ssl_runner.report import page as page_module
from ssl_runner.report.comparisons import Comparison, compare
from ssl_runner.report.figures.curves import curves
from ssl_runner.report.figures.heat import heat
from ssl_runner.report.figures.measures import measures, spectra
from ssl_runner.report.figures.options import by_option
from ssl_runner.report.figures.style import MIN_FONT, STYLE, Picture
from ssl_runner.report.read import read_runs
from tests.test_report import PROBE, ssl_report, write_run

HOSTILE = '"><script>alert(1)</script>'
MEASURED = (
    "epoch,loss,rank,effective_rank,alignment,loss_gap,label_energy\n1,9,,,,,\n2,{0},{0},1,0.5,{0},0.1\n"
)


def write(folder: Path, top1: float | None, loss: str = "VICReg", rank: float = 1, **options: object) -> Path:
    """Write a run of a loss, with diagnostics, a spectrum and a top-1 at two epochs."""
    names = ("tags", "note", "started", "data_digest", "error", "status", "images")
    record = {name: options.pop(name) for name in names if name in options}
    words = tuple(f"{key.replace('__', '.')}={value}" for key, value in options.items())
    options |= {"loss": {"_target_": f"ssl_runner.loss.{loss}"}}
    metrics = MEASURED.format(rank)
    write_run(folder, top1, top1, metrics=metrics, overrides=words, record=record, **options)
    if top1 is not None:
        rows = [f"{epoch},linear,backbone,train,val,l2=1 (val),9,{top1},,1\n" for epoch in (1, 2)]
        test = f"2,linear,backbone,train,test,l2=1 (val),9,{top1},,1\n"
        (folder / "probe.csv").write_text(PROBE + "".join(rows) + test)
    (folder / "spectrum.csv").write_text(f"k,Z,closed_form\n1,{rank},2.0\n2,0.5,1.0\n")
    return folder


def compared(folder: Path) -> list[Comparison]:
    return compare(read_runs([folder], folder / "report"))[1]


def drawn(picture: Picture | None) -> Picture:
    assert picture is not None
    return picture


class Elements(HTMLParser):
    """The start tags of a page with their attributes, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def having(self, name: str) -> Iterator[dict[str, str]]:
        return (attributes for _, attributes in self.found if name in attributes)


def test_runs_are_ranked_on_equal_images_and_protocols_only(tmp_path: Path, monkeypatch, capsys) -> None:
    """Three data sets, of which two have one name; kNN instead of the linear probe; other test images."""
    digests = {"a": "mnist", "b": "photos", "c": "photos"}
    for data, name in digests.items():
        for gamma in (1, 2):
            write(tmp_path / f"{data}{gamma}", 0.1 * gamma, gamma=gamma, dataset__name=name, data_digest=data)
    knn = write(tmp_path / "knn", 0.9, gamma=3, dataset__name="mnist", data_digest="a")
    (knn / "probe.csv").write_text((knn / "probe.csv").read_text().replace("linear", "knn"))
    few = {"dataset__name": "mnist", "data_digest": "a", "images": {"test": 7, "val": 5}}
    write(tmp_path / "few", 0.8, gamma=4, **few)
    parts = compared(tmp_path)
    assert {part.title: part.summary.val_top1.tolist() for part in parts} == {
        "mnist: linear on backbone, test images": [0.2, 0.1],
        "photos b: linear on backbone, test images": [0.2, 0.1],
        "photos c: linear on backbone, test images": [0.2, 0.1],
        "mnist: knn on backbone, test images": [0.9],
        "mnist: linear on backbone, 7 test images": [0.8],
    }
    assert [part.keys for part in parts] == [["gamma"]] * 3 + [[]] * 2
    code, out, _ = ssl_report(monkeypatch, capsys, tmp_path, "--best")
    commands = [line for line in out.splitlines() if not line.startswith("#")]
    assert (code, len(commands)) == (0, 5)
    assert commands[0] == "ssl-run gamma=2 dataset.name=mnist"


@pytest.mark.parametrize(
    "key",
    [
        *("diagnostics.every", "views.preview", "embedding.method", "dataset.root", "dataset.name"),
        *("dataset.storage", "logger.project", "probe.cache", "note", "profile"),
    ],
)
def test_options_that_change_no_accuracy_are_not_swept(tmp_path: Path, key: str) -> None:
    for seed, value in enumerate(("a", "b", "a")):
        options = {key.replace(".", "__"): value, "seed": seed, "data_digest": "x"}
        write(tmp_path / str(seed), 0.5 + seed / 10, **options)
    [part] = compared(tmp_path)
    assert part.keys == []
    assert part.summary.n.tolist() == [3]


def test_unfinished_runs_join_the_largest_comparison_and_failed_ones_none(tmp_path: Path) -> None:
    """The last two have not read their images, so they have no digest."""
    for i, (images, status) in enumerate([(7, "done"), (9, "done"), (9, "done"), (9, "running")]):
        top1 = 0.5 if status == "done" else None
        named = {"dataset__name": "a", "data_digest": None if status == "running" else "x"}
        write(tmp_path / str(i), top1, gamma=i, images={"test": images}, status=status, **named)
    write(tmp_path / "failed", None, gamma=9, status="failed", error="Boom", dataset__name="a")
    table, parts = compare(read_runs([tmp_path], tmp_path / "report"))
    assert [sorted(part.runs) for part in parts] == [[1, 2, 3], [0]]
    assert set(table.data) == {"a"}


def test_numbers_of_any_size_and_missing_files_are_drawn_or_left_out(tmp_path: Path) -> None:
    for i, rank in enumerate((1.0, 2.0, 1e300, -1e300, np.inf, np.nan)):
        write(tmp_path / str(i), 0.1 * i, gamma=i, rank=rank)
    (tmp_path / "0" / "spectrum.csv").unlink()
    (tmp_path / "1" / "spectrum.csv").write_text("k,Z\n1,x\n2,0.5\n")
    [part] = compared(tmp_path)
    axes = {ax.get_title(): ax for ax in drawn(measures(part)).figure.axes}
    assert len(axes["rank"].collections[0].get_offsets()) == 2
    assert spectra(part) is None
    assert set(figures.draw(part)) == {"keys", "measures", "curves"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Three seeds of four configurations of VICReg, two seeds of SimCLR, a refused and a failed run."""
    folder = tmp_path_factory.mktemp("sweep") / "runs #1"
    for seed in range(3):
        for gamma, lr in ((1, 0.1), (10, 0.1), (2, 0.1), (2, 0.2)):
            options = {"gamma": gamma, "optimizer__lr": lr, "seed": seed, "tags": ["grid", HOSTILE]}
            top1 = min(0.6 + 0.1 * seed + gamma / 50, 1)
            name = folder / f"{gamma} {lr}" / str(seed)
            write(name, top1, rank=gamma + seed, started=f"2026-01-0{seed + 1}T00:00:00", **options)
    for seed in range(2):
        for tau in (0.5, 0.25):
            write(folder / f"simclr{tau}{seed}", 0.3 + seed / 10, "SimCLR", rank=8, tau=tau, seed=seed)
    (folder / "10 0.1" / "0" / "embedding.png").write_bytes(b"map")
    write(folder / "refused", None, status="failed", error=f"UsageError: dataset.root={HOSTILE}: no")
    write(folder / "failed", None, status="failed", error="Diverged: at step 2", tags=["grid"])
    return folder


@pytest.fixture(scope="module")
def part(sweep: Path) -> Comparison:
    [found] = compared(sweep)
    return found


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory) -> Path:
    """A report without the content of the figures, which takes most of the time."""
    out = tmp_path_factory.mktemp("out") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "saved", lambda picture: {"png": b"", "svg": b""})
        cli.report(read_runs([sweep], out), out, "title")
    return out


def test_page_has_what_filters_compare_of_each_run(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Elements(text)
    runs = {attributes["data-run"]: attributes for attributes in page.having("data-run")}
    assert sorted(map(int, runs)) == list(range(18))
    assert [json.loads(attributes["data-tags"]) for attributes in runs.values()].count(
        ["grid", HOSTILE]
    ) == 12
    assert {attributes["data-status"] for attributes in runs.values()} == {"done", "failed"}
    assert {attributes["data-date"] for attributes in runs.values()} == {
        "",
        *(f"2026-01-0{i}" for i in (1, 2, 3)),
    }
    rows = [a["data-runs"].split() for tag, a in page.found if tag == "tr" and "data-runs" in a]
    assert sorted(map(len, rows)) == [2, 2, 3, 3, 3, 3]  # a row of configurations has its runs
    assert {run for row in rows for run in row} <= set(runs)
    assert [tag for tag, _ in page.found].count("script") == 1
    assert text.count(HOSTILE) == 0
    names = {attributes.get("name") for tag, attributes in page.found if tag in ("select", "input")}
    assert names >= {"data", "status", "tag", "from", "to", "text"}


def test_links_of_the_page_lead_to_the_files_of_runs(written: Path) -> None:
    page = Elements((written / "report.html").read_text())
    targets = [a["href"] for tag, a in page.found if tag == "a"]
    assert all((written / unquote(target)).exists() for target in targets)
    assert sum(target.endswith("/spectrum.csv") for target in targets) == 16
    assert sum(target.endswith("/embedding.png") for target in targets) == 1
    assert not any(":" in target or target.startswith("/") for target in targets)


def test_refusals_and_failures_have_sections_and_are_not_in_the_table_of_runs(written: Path) -> None:
    text = (written / "report.html").read_text()
    refused, failed, rest = (text.index(f"<h2>{name}</h2>") for name in ("Refusals", "Failures", "Runs"))
    assert "dataset.root=" in text[refused:failed]
    assert "Diverged: at step 2" in text[failed:rest]
    assert "/failed" not in text[rest:]


def test_measures_are_columns_that_are_switched_on(written: Path) -> None:
    page = Elements((written / "report.html").read_text())
    boxes = [a for tag, a in page.found if "data-column" in a and a["data-table"] == "configurations-1"]
    assert [("checked" in box) for box in boxes[-5:]] == [False] * 5
    assert all("checked" in box for box in boxes[:-5])
    table = pd.read_csv(written / "configurations.csv")
    assert table["metrics.rank"].dropna().sort_values().tolist() == [2, 3, 3, 8, 8, 11]
    assert (table["± val_top1"].notna() == (table.n >= 3)).all()


def test_figures_of_the_page_have_labels(written: Path) -> None:
    page = Elements((written / "report.html").read_text())
    ids = [attributes["id"] for attributes in page.having("id")]
    assert [tag for tag, _ in page.found].count("figure") == len(figures.FIGURES)
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for attributes in page.having("aria-labelledby")} <= set(ids)
    alts = [attributes["alt"] for tag, attributes in page.found if tag == "img"]
    expected = [
        f"{page_module.ALTS[name]} (mnist5k: linear on backbone, test images)" for name in figures.FIGURES
    ]
    assert alts[:-1] == expected
    assert alts[-1].startswith(f"{page_module.EMBEDDING_ALTS['embedding.png']} (run ")


def test_text_of_figures_is_at_least_10_pixels_high(part: Comparison, written: Path) -> None:
    """The images do not become narrower than `min-width`, so that text keeps its size."""
    page = Elements((written / "report.html").read_text())
    widths = [int(re.findall(r"\d+", a["style"])[0]) for tag, a in page.found if "style" in a]
    with matplotlib.rc_context(STYLE):
        for width, make in zip(widths, figures.FIGURES.values(), strict=True):
            figure = drawn(make(part)).figure
            sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
            assert min(sizes) >= MIN_FONT
            assert min(sizes) / 72 * width / figure.get_figwidth() > 9.99


def test_axes_of_accuracies_stay_within_0_and_100(part: Comparison) -> None:
    pictures = [drawn(make(part)) for make in (by_option, measures, curves)]
    axes = [ax for picture in pictures for ax in picture.figure.axes if "(%)" in ax.get_ylabel()]
    assert len(axes) > 8
    for ax in axes:
        assert 0 <= ax.get_ylim()[0] < ax.get_ylim()[1] <= 100
        for bars in ax.collections:
            for path in bars.get_paths() if hasattr(bars, "get_segments") else []:  # error bars
                assert not np.any((path.vertices[:, 1] < 0) | (path.vertices[:, 1] > 100))


def test_seeds_are_points_where_there_is_no_interval(part: Comparison) -> None:
    axes = {ax.get_title(): ax for ax in drawn(by_option(part)).figure.axes}
    assert set(axes) >= {"loss", "SimCLR: tau", "VICReg: gamma", "VICReg: optimizer.lr"}
    [val, *_] = [c for c in axes["SimCLR: tau"].collections if not hasattr(c, "get_segments")]
    np.testing.assert_allclose(
        sorted(val.get_offsets().tolist()), [[0.25, 30], [0.25, 40], [0.5, 30], [0.5, 40]]
    )
    [none, *_] = [c for c in axes["VICReg: gamma"].collections if not hasattr(c, "get_segments")]
    assert len(none.get_offsets()) == 0


def test_lines_join_values_with_equal_settings_of_other_options(part: Comparison) -> None:
    """gamma=2 has a second learning rate, so its mean is over other settings than those of 1 and 10."""
    [gammas] = [ax for ax in drawn(by_option(part)).figure.axes if ax.get_title() == "VICReg: gamma"]
    joined = [line.get_xdata().tolist() for line in gammas.lines if line.get_linestyle() == "-"]
    assert joined == [[1, 10]] * 2


def test_heat_map_notes_configurations_that_it_does_not_show(part: Comparison, tmp_path: Path) -> None:
    assert drawn(heat(part)).notes == ["Not in the map: 2 of SimCLR, in which fewer than two options differ."]
    for i, options in enumerate([{"V": 2, "gamma": 1}, {"V": 3, "gamma": 2}, {"V": 4}]):
        write(tmp_path / str(i), 0.1 * i, **options)
    [other] = compared(tmp_path)
    assert other.keys == ["V", "gamma"]
    assert drawn(heat(other)).notes == ["Not in the map: 1 of VICReg, without V or gamma."]
    columns = {"V": ["1", None, "2", None], "gamma": [None, "1", None, "2"]}  # no run has both options
    other.results = pd.concat([other.results, other.results.iloc[:1]]).assign(**columns)
    assert heat(other) is None


def test_curves_have_rows_per_loss_and_legends_in_numeric_order(part: Comparison) -> None:
    axes = drawn(curves(part)).figure.axes
    loss, top1, legend = (axes[i::3] for i in range(3))
    assert [ax.get_title() for ax in loss] == ["SimCLR: loss", "VICReg: loss"]
    assert [text.get_text() for text in legend[0].get_legend().get_texts()] == ["tau=0.25", "tau=0.5"]
    assert [text.get_text() for text in legend[1].get_legend().get_texts()] == [
        "gamma=1, optimizer.lr=0.1",
        "gamma=2, optimizer.lr=0.1",
        "gamma=2, optimizer.lr=0.2",
        "gamma=10, optimizer.lr=0.1",
    ]
    styles = [(line.get_color(), line.get_linestyle()) for line in legend[1].get_legend().get_lines()]
    assert len(set(styles)) == 4
    assert len({ax.get_ylim() for ax in top1}) == 1
    assert len({ax.get_xlim() for ax in [*loss, *top1]}) <= 2
    shown = [line.get_ydata().mean() for ax in top1 for line in ax.lines]
    assert all(ax.get_ylim()[0] <= y <= ax.get_ylim()[1] for ax in top1 for y in shown)


def test_legend_of_many_curves_names_the_options_it_does_not_show(tmp_path: Path) -> None:
    for gamma in (2, 10, 1):
        for lr in range(4):
            write(tmp_path / f"{gamma}{lr}", 0.1 * gamma % 1, gamma=gamma, optimizer__lr=lr)
    [part] = compared(tmp_path)
    legend = drawn(curves(part)).figure.axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2", "10"]
    assert legend.get_title().get_text() == "gamma (lines of one colour differ in\noptimizer.lr)"


def test_scatter_of_measures_shows_means_and_a_loss_gap_per_loss(part: Comparison) -> None:
    axes = {ax.get_title(): ax for ax in drawn(measures(part)).figure.axes if ax.get_title()}
    assert list(axes) == [
        *("rank", "effective rank", "alignment", "loss gap of SimCLR", "loss gap of VICReg", "label energy")
    ]
    simclr, vicreg = (points.get_offsets().tolist() for points in axes["rank"].collections)
    np.testing.assert_allclose(simclr, [[8, 35], [8, 35]])
    np.testing.assert_allclose(sorted(vicreg), [[2, 72], [3, 74], [3, 74], [11, 90]])
    assert len({ax.get_ylim() for ax in axes.values()}) == 1
    assert [len(axes[f"loss gap of {loss}"].collections) for loss in ("SimCLR", "VICReg")] == [1, 1]


def test_spectra_show_files_of_each_seed_and_the_best_of_each_loss_first(part: Comparison) -> None:
    picture = drawn(spectra(part))
    axes = [ax for ax in picture.figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes[:2]] == [
        "loss=VICReg, gamma=10, optimizer.lr=0.1",
        "loss=SimCLR, optimizer.lr=0.002, tau=0.5",
    ]
    measured, optimal = axes[0].lines[::2], axes[0].lines[1::2]
    assert [line.get_ydata().tolist() for line in measured] == [[10, 0.5], [11, 0.5], [12, 0.5]]
    assert [line.get_ydata().tolist() for line in optimal] == [[2, 1]] * 3
    assert picture.notes == []


def test_pictures_of_embeddings_start_with_the_best_run_on_each_data_set(tmp_path: Path) -> None:
    for name, top1 in (("a", 0.9), ("b", 0.1), ("c", 0.8), ("d", 0.2)):
        folder = write(tmp_path / name, top1, dataset__name="x" if top1 > 0.5 else "y", gamma=top1)
        (folder / "embedding.png").write_bytes(b"map")
    runs = read_runs([tmp_path], tmp_path / "report")
    maps, more = page_module.embeddings(runs, compare(runs)[0], ["gamma"])
    assert [found["label"] for found in maps] == [
        *("x, VICReg, gamma=0.9", "y, VICReg, gamma=0.2", "y, VICReg, gamma=0.1", "x, VICReg, gamma=0.8")
    ]
    assert more <= 0


def test_lines_and_spectra_of_configurations_without_an_option_are_told_apart(tmp_path: Path) -> None:
    for i, options in enumerate([{"V": 2}, {"V": 2, "gamma": 1}, {"V": 2, "gamma": 2}]):
        write(tmp_path / str(i), 0.1 * i, **options)
    [part] = compared(tmp_path)
    assert [ax.get_title() for ax in drawn(spectra(part)).figure.axes[:3]] == [
        "gamma=2",
        "gamma=1",
        "without gamma",
    ]
    legend = drawn(curves(part)).figure.axes[-1].get_legend()
    assert sorted(text.get_text() for text in legend.get_texts()) == ["gamma=1", "gamma=2", "without gamma"]
