"""Every snippet of docs/extending.md works: its files are written to a folder and its commands run there."""

import csv
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ssl_runner.relation import Labels, Views
from ssl_runner.theory import EXACT, linear_optimum, optimum
from ssl_runner.theory.moments import Moments
from tests.helpers import TINY, run_folder, table

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE, re.M | re.S))
COMMANDS = [
    line.removeprefix("ssl-run ")
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.splitlines()
]


@pytest.fixture(autouse=True)
def snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write all files of the page to the folder in which the tests run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mine"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def run_command(ssl_run) -> Callable[[str], Path]:
    """Return a function that runs the page's first command with `word` in it and returns the run folder."""

    def run(word: str) -> Path:
        command = next(command for command in COMMANDS if word in command)
        tiny = f"{TINY} epochs=1 diagnostics.num_images=40"
        if "backbone=" in command:
            tiny = tiny.replace("backbone.widths=[8,16]", "")
        if "solver=" in command:
            tiny = tiny.replace("projector.width=16 projector.K=8", "backbone.width=6")
        if "probe.probes=" in command:
            tiny = tiny.replace("probe.probes=[knn]", "")
        code, out, err = ssl_run(f"{tiny} {command}")
        assert (code, err) == (0, "")
        return run_folder(out)

    return run


def last_row(folder: Path) -> dict[str, str]:
    return table(folder / "metrics.csv")[-1]


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_every_snippet_is_used() -> None:
    """A file has a title, and a command a test below."""
    assert len(FILES) == 13
    assert len(re.findall(r"^```(?:python|yaml)", PAGE, re.M)) == len(FILES)
    assert len(COMMANDS) == 9


def test_loss_trains_and_is_compared_with_its_optimum(run_command) -> None:
    row = last_row(run_command("loss=weighted"))
    assert_close(
        float(row["loss"]), 3 * float(row["repulsion"]) + float(row["attraction"]), rtol=1e-5, atol=0
    )
    assert row["optimum_kind"] == EXACT
    assert float(row["loss_gap"]) > 0
    assert float(row["alignment"]) >= 0


def test_loss_is_solved_for_a_linear_model(run_command) -> None:
    row = last_row(run_command("solver=closed_form"))
    assert (row["loss_name"], row["loss_kind"]) == ("WeightedSpectral", EXACT)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("G", [Views(6, 2), Labels(torch.arange(12) % 3)], ids=["views", "labels"])
def test_registered_optimum_is_stationary_and_has_its_value(G) -> None:
    loss = importlib.import_module("mine.losses").WeightedSpectral(3.0)
    best = optimum(loss, G, K=4)
    Z = best.Z.requires_grad_()
    value = loss(Z, G)
    value.backward()
    assert_close(value.item(), best.value)
    assert Z.grad.norm() < 1e-9
    assert_close(torch.linalg.svdvals(Z.detach()), best.singular_values)
    with torch.no_grad():
        assert all(loss(Z + 0.1 * torch.randn(12, 4), G) > value for _ in range(10))


@pytest.mark.usefixtures("importable")
def test_registered_linear_optimum_is_stationary_and_has_its_value() -> None:
    loss, G = importlib.import_module("mine.losses").WeightedSpectral(3.0), Labels(torch.arange(12) % 3)
    X = torch.randn(12, 5, dtype=torch.float64)
    moments = Moments(5, torch.device("cpu"))
    moments.add(X, G)
    best = linear_optimum(loss, moments.centred(), 2)
    W, bias = best.W.requires_grad_(), best.bias.requires_grad_()
    value = loss(X @ W + bias, G)
    value.backward()
    assert_close(value.item(), best.value)
    assert W.grad.norm() + bias.grad.norm() < 1e-9


def test_relation_trains(run_command) -> None:
    folder = run_command("relation=residues")
    assert record(folder)["relation"]["target"] == "mine.relations.FromResidues"
    row = last_row(folder)
    assert float(row["relation_label_energy"]) > 0
    assert float(row["optimum_rank"]) <= 8


def test_views_train_and_are_those_of_the_whole_batch_on_every_rank(run_command) -> None:
    run_command("views=noise")
    images, stats = torch.randint(256, (4, 1, 5, 5), dtype=torch.uint8), (torch.zeros(1), torch.ones(1))
    noise = importlib.import_module("mine.views").Noise(0.5)
    whole = noise(images, 3, *stats, torch.Generator().manual_seed(0)).unflatten(0, (3, 4))
    for rank in (0, 1):
        own = noise(images[2 * rank :][:2], 3, *stats, torch.Generator().manual_seed(0), rank, 2)
        assert_close(own.unflatten(0, (3, 2)), whole[:, 2 * rank :][:, :2])


def test_data_set_trains(run_command) -> None:
    facts = record(run_command("dataset=stripes"))
    assert facts["classes"] == ["horizontal", "vertical"]
    assert facts["images"] == {"pretrain": 180, "train": 180, "val": 20, "test": 200}


def test_backbone_trains_and_its_weights_name_its_choice(run_command, ssl_run) -> None:
    folder = run_command("backbone=patches")
    assert record(folder)["parameters"]["backbone"] == 32 * (16 + 1)
    tiny = f"{TINY.replace('backbone.widths=[8,16]', '')} epochs=1 --config-dir conf"
    command = f"{tiny} diagnostics.every=0 init_weights={folder}/backbone.safetensors"
    code, _, err = ssl_run(command)
    assert code == 1
    assert "found those for backbone=patches backbone.width=32; set " in err
    assert ssl_run(f"{command} {err.rpartition('; set ')[2]}")[1].startswith("init_weights: 2 of 2 tensors")


@pytest.mark.parametrize("command", ["probe=with_means", "+probe.classifiers"])
def test_probe_is_evaluated(run_command, command: str) -> None:
    rows = [row for row in table(run_command(command) / "probe.csv") if row["probe"] == "means"]
    assert {row["eval_split"] for row in rows} == {"val", "test"}
    assert all(float(row["top1"]) > 0.2 for row in rows)
    assert all(re.fullmatch(r"normalized=[01] \(val\)", row["selection"]) for row in rows)


def test_evaluator_adds_a_column(run_command) -> None:
    with open(run_command("+evaluators") / "metrics.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert float(row["feature_norm"]) > 0


def test_own_loss_of_the_readme_trains(ssl_run, tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for path, content in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', readme, re.M | re.S):
        (tmp_path / path).write_text(content)
    [command] = re.findall(r"^    ssl-run (.*loss=uniformity.*)$", readme, re.M)
    code, out, err = ssl_run(f"{TINY} {command}")
    assert (code, err) == (0, "")
    row = last_row(run_folder(out))
    assert float(row["loss"]) == pytest.approx(
        3 * float(row["distance"]) + float(row["uniformity"]), rel=1e-4
    )
