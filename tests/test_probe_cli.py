"""ssl-probe on finished runs: rows, label shares, layers, fine-tuning, refusals."""

import csv
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ssl_runner.backbone import Backbone, convnet, resnet
from ssl_runner.data.dataset import DataSet, Source
from ssl_runner.errors import UsageError
from ssl_runner.evaluation import embed_cli, probe_cli
from ssl_runner.evaluation.finished import config_of
from ssl_runner.model import SSLModel
from ssl_runner.probe import (
    FineTuning,
    LayerFeatures,
    LinearProbe,
    check_layer,
    evaluate,
    extract,
    finetune,
    label_draws,
)
from ssl_runner.report import tables
from ssl_runner.report.read import read_run
from ssl_runner.runs.files import read_json, write_json
from tests.helpers import CPU, TINY, load, run_script, table

PAGE = Path(__file__).parent.parent / "docs" / "evaluate.md"


@pytest.fixture
def finished(ssl_run, cached: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of one epoch."""
    if not cached.exists():
        code, _, err = ssl_run(f"{TINY} epochs=1 diagnostics.every=0 hydra.run.dir='{cached}'")
        assert (code, err) == (0, "")
    return shutil.copytree(cached, tmp_path / "run")


@pytest.fixture
def ssl_probe(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Return a function that runs `ssl-probe` on the finished run in-process."""

    def run(settings: str) -> tuple[int, str, str]:
        return run_script(probe_cli.main, [str(finished), *shlex.split(settings)], monkeypatch, capsys)

    return run


def test_ssl_probe_repeats_the_rows_of_the_run(ssl_probe, finished: Path) -> None:
    before = table(finished / "probe.csv")
    assert ssl_probe("")[0] == 0
    after = [{**row, "probing": ""} for row in table(finished / "probe.csv")]
    assert after == [{**row, "probing": ""} for row in before * 2]


def test_ssl_probe_appends_rows_of_another_data_set_that_the_report_names(ssl_probe, finished: Path) -> None:
    name = "dataset=mnist5k dataset.subset=100 dataset.name=fewer"
    assert ssl_probe(name)[0] == 0
    rows = table(finished / "probe.csv")
    assert {row["dataset"] for row in rows} >= {"mnist5k", "fewer"}
    scores = tables.scores(read_run(finished))
    assert scores["top1.test.backbone.knn"] == float(rows[1]["top1"]) == scores["top1"]
    assert scores["top1.test.backbone.knn.fewer"] == float(rows[-1]["top1"])


def test_ssl_probe_extends_the_header_of_an_earlier_probe_csv(ssl_probe, finished: Path) -> None:
    with open(finished / "probe.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "dataset"} for row in csv.DictReader(file)]
    with open(finished / "probe.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert ssl_probe("probe.labels=[0.1] probe.draws=2")[0] == 0
    after = table(finished / "probe.csv")
    assert [row["dataset"] for row in after] == ["", "", *["mnist5k"] * 4]
    assert [row["draw"] for row in after] == ["", "", "0", "0", "1", "1"]
    assert [row["n_train"] for row in after[2:]] == ["18"] * 4
    scores = tables.scores(read_run(finished))
    assert scores["top1.test.backbone.knn"] == float(after[1]["top1"])
    shared = [float(row["top1"]) for row in after[2:] if row["eval_split"] == "test"]
    assert scores["top1.test.backbone.knn.labels=0.1"] == pytest.approx(np.mean(shared))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("epochs=3", "epochs=3: expected options of dataset, probe, device, precision"),
        ("probe.labels=[2]", "probe.labels=[2]: expected a list of different numbers"),
        ("probe.labels=0.1,0.2", "expected one value; write a list as [a,b]"),
        (
            "probe.layer=nope",
            "probe.layer=nope: expected the name of a module of the backbone; use one of 0,",
        ),
        ("probe.layer=9", "probe.layer=9: expected the name of a module of the backbone; use one of 0,"),
        ("probe.layer=1.5", "probe.layer=1.5: expected text or an integer or null"),
        ("probe=none", "Unknown probe 'none'"),
        ("probe.foo=1", "Unknown option 'probe.foo'. Did you mean 'probe.probes'?"),
        (
            "probe.probes=[finetune]",
            "expected a non-empty list of linear, knn, ridge without repeats; to fine-tune, run ssl-probe"
            " FOLDER probe=finetune",
        ),
        ("dataset.sise=3", "Unknown option 'dataset.sise'"),
    ],
)
def test_ssl_probe_rejects_invalid_settings_in_one_line(ssl_probe, settings: str, message: str) -> None:
    code, _, err = ssl_probe(settings)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def page_commands(program: str) -> list[list[str]]:
    """The words of the page's commands that call a program, after the program and RUN."""
    lines = [line.partition(" #")[0].split() for line in PAGE.read_text().splitlines()]
    return [words[2:] for words in lines if words[:2] == [program, "RUN"]]


def test_commands_of_the_page_are_accepted(finished: Path, tmp_path: Path) -> None:
    probes, embeddings = page_commands("ssl-probe"), page_commands("ssl-embed")
    assert len(probes) >= 5
    assert len(embeddings) >= 3
    for words in probes:
        config_of(finished, [word.replace("FOLDER", str(tmp_path)) for word in words])
    for words in embeddings:
        args = embed_cli.parser().read(["RUN", *words])
        config_of(finished, [word for word in args.source if "=" in word])


def test_ssl_run_rejects_finetune(ssl_run) -> None:
    code, _, err = ssl_run(f"{TINY.replace('probe.probes=[knn]', 'probe=finetune')}")
    assert code == 1
    assert "run ssl-probe FOLDER probe=finetune after the run" in err
    assert not Path("outputs").exists()


def test_ssl_probe_rows_carry_the_exported_epoch(ssl_probe, finished: Path) -> None:
    record = read_json(finished / "run.json")
    write_json(finished / "run.json", record | {"exported_epoch": 7})  # as with probe.keep=best
    assert ssl_probe("")[0] == 0
    assert table(finished / "probe.csv")[-1]["epoch"] == "7"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 1.0])
def test_label_draws_are_class_balanced_nested_and_seeded(share: float) -> None:
    y = torch.arange(200) % 7
    draws = label_draws(y, [share], 3, seed=5)
    for draw in draws:
        counts = torch.bincount(y[draw.positions], minlength=7)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1
        assert len(draw.positions.unique()) == len(draw.positions) == max(7, round(share * 200))
    again = label_draws(y, [share, 1.0], 3, seed=5)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(draws, again[:3], strict=True))
    whole = again[3].positions
    assert torch.equal(whole[: len(draws[0].positions)], draws[0].positions)


def test_evaluate_fits_a_share_on_its_rows_alone() -> None:
    data = blobs()
    [draw] = label_draws(data.train.y, [0.2], 1, seed=0)
    rows = list(evaluate("pixels", nn.Flatten(), data, {"linear": LinearProbe}, True, [draw]))
    X, X_val = (extract(nn.Flatten(), part, data.mean, data.std) for part in (data.train, data.val))
    probe = LinearProbe(X[draw.positions], data.train.y[draw.positions], 2)
    accuracy = {l2: (s.argmax(1) == data.val.y).float().mean().item() for l2, s in probe.path(X_val)}
    assert rows[0]["top1"] == pytest.approx(max(accuracy.values()))
    assert [row["train_split"] for row in rows] == ["train", "train"]
    assert rows[1]["n_train"] == len(draw.positions)
    assert rows[1]["top1"] <= 1


def test_layer_features_match_a_forward_hook_for_maps_and_before_in_place_layers() -> None:
    x = torch.randn(3, 3, 16, 16)
    for backbone, layer in ((resnet(3, 16, "resnet18"), "layer3"), (convnet(3, 16, [4, 8]), "1")):
        backbone.eval()
        kept: list[torch.Tensor] = []
        module = backbone.body.get_submodule(layer)
        handle = module.register_forward_hook(lambda m, i, output, kept=kept: kept.append(output.clone()))
        backbone(x)
        handle.remove()
        assert_close(LayerFeatures(backbone, layer)(x), kept[0].mean((2, 3)))


def test_layer_features_average_tokens_and_keep_vectors() -> None:
    body = nn.Sequential(nn.Flatten(2), nn.Linear(16, 5), nn.Flatten())
    x = torch.randn(2, 3, 4, 4)
    assert_close(LayerFeatures(Backbone(body, 15), "1")(x), body[:2](x).mean(1))
    assert_close(LayerFeatures(Backbone(body, 15), "2")(x), body(x))
    with pytest.raises(UsageError, match="expected the name of a module of the backbone; use one of 0, 1, 2"):
        LayerFeatures(Backbone(body, 15), "layer9")


def blobs(side: int = 8, n: int = 120) -> DataSet:
    """Two classes of random stripes, horizontal and vertical, which no linear map of pixels separates."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    lines = (torch.rand(n, 1, side, 1, generator=generator) > 0.5).expand(-1, 3, side, side)
    images = torch.where(labels.view(-1, 1, 1, 1) == 0, lines, lines.transpose(2, 3)).to(torch.uint8) * 200
    rows = np.arange(n)
    return load(Source(images, labels, ["a", "b"], rows[:80], rows[80:], rows[:0]), val_fraction=0.25)


def test_finetune_beats_the_frozen_probe_and_leaves_the_model() -> None:
    data = blobs()
    torch.manual_seed(0)
    model = SSLModel(convnet(3, 8, [4]), nn.Identity())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = FineTuning(epochs=12, batch_size=16, lr=0.02, weight_decay=0.0, policy={"flip": 0.5})
    rows = list(finetune(model, data, options, [None], "fp32", seed=0))
    frozen = list(evaluate("backbone", model.backbone, data, {"linear": LinearProbe}, True))
    assert rows[1]["top1"] >= frozen[1]["top1"]
    assert rows[1]["top1"] > 0.9
    assert [row["eval_split"] for row in rows] == ["val", "test"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finetune_with_the_same_seed_gives_the_same_rows() -> None:
    data, options = blobs(), FineTuning(2, batch_size=16, lr=0.02, weight_decay=0.0, policy={"flip": 0.5})
    model = SSLModel(convnet(3, 8, [4]), nn.Identity())
    [first, second] = (
        [row | {"seconds": 0} for row in finetune(model, data, options, [None], "fp32", seed)]
        for seed in (3, 3)
    )
    assert first == second


def test_finetune_of_ssl_probe_adds_rows(ssl_probe, finished: Path) -> None:
    code, out, err = ssl_probe("probe=finetune probe.finetune.epochs=1 probe.labels=[0.2] probe.draws=1")
    assert code == 0, err
    rows = [row for row in table(finished / "probe.csv") if row["probe"] == "finetune"]
    assert [(row["eval_split"], row["selection"], row["n_train"]) for row in rows] == [
        ("val", "epoch=1 (val)", "36"),
        ("test", "epoch=1 (val)", "36"),
    ]
    assert "finetune" in out


def test_scores_average_the_draws_of_the_last_probing_alone(ssl_probe, finished: Path) -> None:
    assert ssl_probe("probe.labels=[0.1] probe.draws=3")[0] == 0
    assert ssl_probe("probe.labels=[0.1] probe.draws=1")[0] == 0
    rows = table(finished / "probe.csv")
    assert [row["probing"] for row in rows[:2]] == ["", ""]
    assert len({row["probing"] for row in rows[2:8]}) == 1
    assert rows[8]["probing"] > rows[7]["probing"]
    assert tables.scores(read_run(finished))["top1.test.backbone.knn.labels=0.1"] == float(rows[-1]["top1"])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ("dataset.val_fraction=0.3", "mnist5k:val_fraction=0.3"),
        ("dataset=mnist5k", "mnist5k:subset=null"),
        ("dataset=cifar10", "cifar10"),
        ("dataset=cifar10 dataset.subset=200", "cifar10:subset=200"),
        ("dataset=cifar10 dataset.size=8", "cifar10"),
        ("dataset=folder dataset.root=/a/b", "folder:root=/a/b"),
        ("dataset=folder dataset.root=[/a/b,/c]", "folder:root=[/a/b,/c]"),
        ("dataset=cifar10 dataset.subset=200 dataset.name=few", "few"),
    ],
)
def test_name_of_a_data_set_lists_options_other_than_those_of_the_run(
    finished: Path, settings: str, name: str
) -> None:
    assert config_of(finished, settings.split()).dataset.name == name


def test_options_of_the_run_keep_the_name_of_its_data_set(finished: Path) -> None:
    assert config_of(finished, ["dataset.subset=200"]).dataset.name == "mnist5k"


def test_ssl_probe_with_other_options_keeps_the_result_of_the_run(ssl_probe, finished: Path) -> None:
    before = tables.scores(read_run(finished))
    assert ssl_probe("dataset.subset=100")[0] == 0
    after = tables.scores(read_run(finished))
    assert {name: after[name] for name in before} == before
    assert "top1.test.backbone.knn.mnist5k:subset=100" in after


def test_lda_is_refused_with_shares_of_the_labels(ssl_probe) -> None:
    code, _, err = ssl_probe("probe.features=[backbone,lda] probe.labels=[0.2]")
    assert code == 1
    assert "expected a list without lda, which is fitted on all labels" in err


@pytest.mark.parametrize(
    "settings",
    [
        "probe.features=[backbone] probe.layer=nope",
        "probe=finetune probe.probes=[knn,finetune] probe.finetune.policy.flip=7",
        "probe=finetune probe.probes=[knn,finetune] +probe.finetune.policy.size=16",
    ],
)
def test_invalid_settings_are_refused_before_the_first_row(ssl_probe, finished: Path, settings: str) -> None:
    before = (finished / "probe.csv").read_bytes()
    assert ssl_probe(settings)[0] == 1
    assert (finished / "probe.csv").read_bytes() == before


def test_check_layer_refuses_an_output_without_features() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.chunk(2)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = Halves()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat(self.halves(x)).flatten(1)

    with pytest.raises(UsageError, match="found tuple; use another layer"):
        check_layer(Backbone(Joined(), 12), "halves", (3, 2, 2), CPU)
    check_layer(convnet(3, 16, [4, 8]), 1, (3, 16, 16), CPU)


def test_number_of_a_layer_is_accepted_without_quotes(ssl_probe, finished: Path) -> None:
    assert ssl_probe("probe.layer=3 probe.features=[projector]")[0] == 0
    features = [row["features"] for row in table(finished / "probe.csv")[2:]]
    assert features == ["projector"] * 2 + ["backbone.3"] * 2


def test_settings_are_optional(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-probe"])
    with pytest.raises(SystemExit):
        probe_cli.main()
    assert "expected RUN; list" in capsys.readouterr().err


def labelled_folder(root: Path) -> Path:
    """Write 20 images of 28 pixels in two classes, a broken image and a text file. Returns the folder."""
    for name in "ab":
        (root / name).mkdir(parents=True)
        for seed in range(10):
            pixels = np.random.default_rng(seed).integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{seed}.png")
    (root / "a" / "broken.png").write_bytes(b"\x89PNG")
    (root / "a" / "notes.txt").touch()
    return root


def test_skipped_files_of_a_data_set_are_reported(
    ssl_probe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    root = labelled_folder(tmp_path / "images")
    settings = f"dataset=folder dataset.root={root} dataset.on_error=skip dataset.cache={tmp_path / 'cache'}"
    code, out, err = ssl_probe(settings)
    assert code == 0, err
    assert "skipped 2 files" in out
    target = tmp_path / "f.npz"
    monkeypatch.setattr(sys, "argv", ["ssl-embed", str(finished), *settings.split(), "-o", str(target)])
    embed_cli.main()
    err = capsys.readouterr().err
    assert "skipped 2 files" in err
    assert "broken.png" in err


def test_run_without_options_of_later_versions_is_probed(ssl_probe, finished: Path) -> None:
    path = finished / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    before = table(finished / "probe.csv")
    for key in ("deterministic", "compile", "embedding", "init_weights"):
        del config[key]
    for key in ("eval_resize", "eval_crop", "test_fraction"):
        del config.dataset[key]
    for key in ("cache", "keep"):
        del config.probe[key]
    OmegaConf.save(config, path)
    code, _, err = ssl_probe("")
    assert code == 0, err
    again = table(finished / "probe.csv")[len(before) :]
    assert [row | {"probing": ""} for row in again] == [row | {"probing": ""} for row in before]


def test_config_dir_that_has_moved_is_named(ssl_probe, finished: Path) -> None:
    path = finished / ".hydra" / "hydra.yaml"
    config = OmegaConf.load(path)
    source = {"path": "/moved/configs", "schema": "file", "provider": "command-line"}
    config.hydra.runtime.config_sources.append(source)
    OmegaConf.save(config, path)
    code, _, err = ssl_probe("dataset=mnist5k")
    assert code == 1
    assert "/moved/configs, found none; give the present one with --config-dir" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "device=cuda",
            "device=cuda: expected options of dataset; leave it out; the device is set with --device",
        ),
        ("probe.labels=[0.1]", "probe.labels=[0.1]: expected options of dataset"),
        ("--device gpu", "--device=gpu: expected one of auto, cpu, cuda, cuda:<number>, mps"),
        (". dataset=mnist5k", "expected one FOLDER, or dataset=<name>; give one of them"),
        (". .", "expected one FOLDER, or dataset=<name>; give one of them"),
    ],
)
def test_ssl_embed_rejects_settings_that_it_would_ignore(
    words: str, message: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    command = ["ssl-embed", str(finished), *words.split(), "-o", str(tmp_path / "f.npz")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        embed_cli.main()
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_ssl_embed_rejects_a_run_that_failed_for_a_folder_as_well(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    record = finished / "run.json"
    record.write_text(record.read_text().replace('"status": "done"', '"status": "failed"'))
    monkeypatch.setattr(sys, "argv", ["ssl-embed", str(finished), ".", "-o", str(tmp_path / "f.npz")])
    with pytest.raises(SystemExit):
        embed_cli.main()
    assert "expected a finished run, found status failed" in capsys.readouterr().err
