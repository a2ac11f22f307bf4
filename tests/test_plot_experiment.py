"""The figures of experiments agree with the files of their runs."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from scripts import plot_experiment as figures
from scripts import plot_rank
from ssl_runner.errors import UsageError
from ssl_runner.relation import Edges

SOLVERS = {
    "gradient": "ssl_runner.train.Pretraining",
    "closed_form": "ssl_runner.theory.solver.ClosedForm",
}
TARGETS = {"vicreg": "VICReg", "simclr": "SimCLR", "squared": "SpectralContrastive", "barlow": "BarlowTwins"}


def write_run(
    folder: Path,
    loss: str,
    top1: float,
    solver: str = "gradient",
    status: str = "done",
    classes: int = 10,
    K: int = 64,
    **settings: object,
) -> None:
    (folder / ".hydra").mkdir(parents=True)
    backbone = {
        "_target_": f"ssl_runner.backbone.{'linear' if solver == 'closed_form' else 'convnet'}",
        "width": 9,
    }
    shared = {"V": 2, "diagnostics": {"num_images": 260}, "backbone": backbone, "projector": {"K": 64}}
    config = OmegaConf.create(
        {
            "loss": {"_target_": f"ssl_runner.loss.{TARGETS[loss]}"},
            "solver": {"_target_": SOLVERS[solver]},
            **shared,
        }
    )
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    (folder / "run.json").write_text(
        json.dumps({"status": status, "classes": [str(c) for c in range(classes)]})
    )
    metrics = {
        "epoch": [1, 2],
        "seconds": [1.0, 2.0],
        "loss": [3.0, top1],
        "loss_kind": "exact",
        "moments_loss": [4 + top1, 3 + top1],
    }
    pd.DataFrame(metrics).to_csv(folder / "metrics.csv", index=False)
    probe = {
        "epoch": 2,
        "probe": ["linear", "linear"],
        "features": "backbone",
        "eval_split": ["val", "test"],
        "top1": [0.0, top1],
    }
    pd.DataFrame(probe).to_csv(folder / "probe.csv", index=False)
    Z = np.where(np.arange(K) < 20, 1.0, 0.05) if loss == "vicreg" else np.where(np.arange(K) < 9, 2.0, 0.1)
    spectrum = {"k": np.arange(1, K + 1), "Z": Z, "closed_form": 0.5}
    pd.DataFrame(spectrum).to_csv(folder / "spectrum.csv", index=False)


def sweep(folder: Path, losses: dict[str, dict], **shared: object) -> None:
    for loss, own in losses.items():
        for seed in (0, 1, 2):
            name = "_".join(f"{k}{v}" for k, v in (own | shared).items()).replace("/", "")
            write_run(folder / f"{loss}_{name}_{seed}", loss, 0.5 + 0.1 * seed, seed=seed, **own, **shared)


def points(axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    handles, labels = axes.get_legend_handles_labels()
    line = handles[labels.index(label)][0]
    return line.get_xdata(), line.get_ydata()


def test_low_label_shows_mean_over_seeds(tmp_path: Path) -> None:
    for gamma in (1.0, 10.0):
        sweep(tmp_path, {"vicreg": {"gamma": gamma}}, dataset__subset=100, alpha=25.0)
    sweep(tmp_path, {"simclr": {"tau": 0.5}, "barlow": {}}, dataset__subset=100)
    write_run(tmp_path / "failed", "vicreg", 0.0, status="failed", seed=9, gamma=10.0, dataset__subset=100)
    [axes] = figures.low_label(figures.finished_runs(tmp_path)).axes
    x, y = points(axes, "VICReg")
    assert list(x) == [1.0, 10.0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10"]
    np.testing.assert_allclose(y, [0.6, 0.6])
    assert "SimCLR (0.600 ± 0.100)" in axes.get_legend_handles_labels()[1]


def test_rank_vs_gamma_counts_used_directions(tmp_path: Path) -> None:
    for gamma in (1.0, 50.0):
        sweep(tmp_path, {"vicreg": {"gamma": gamma}}, alpha=25.0)
    sweep(tmp_path, {"simclr": {"tau": 0.5}, "barlow": {"alpha": 0.02}})
    left, middle, right = figures.rank_vs_gamma(figures.finished_runs(tmp_path)).axes
    x, y = points(left, "VICReg, trained")
    assert (list(x), list(y)) == ([1.0, 50.0], [20, 20])
    line = left.get_lines()[0]
    assert line.get_ydata()[0] == 64
    assert line.get_ydata()[-1] == 9
    assert [label.get_text() for label in middle.get_xticklabels()] == ["SimCLR\nτ = 0.5", "Barlow\nα = 0.02"]
    assert [float(bar[0].get_ydata()[0]) for bar in middle.containers] == [9, 9]
    assert right.get_xlabel() == "k"


def test_figures_of_both_solvers_show_their_values(tmp_path: Path) -> None:
    for solver in ("gradient", "closed_form"):
        for p in (0.0, 1.0):
            noisy = {
                "relation__rewire_fraction": p,
                "relation___target_": "ssl_runner.relation.builders.Rewired",
            }
            sweep(
                tmp_path / solver,
                {"vicreg": {"gamma": 25.0}, "simclr": {}, "barlow": {}},
                solver=solver,
                **noisy,
            )
    left, right = figures.aligned_vs_misaligned(figures.finished_runs(tmp_path)).axes
    assert left.get_title() == "linear model, closed form, K = 9"
    assert right.get_title() == "convnet, gradient descent, K = 64"
    for axes in (left, right):
        for label in ("VICReg, γ = 25", "SimCLR", "Barlow Twins"):
            x, y = points(axes, label)
            assert list(x) == [0, 1]
            np.testing.assert_allclose(y, [0.6, 0.6])

    for solver in ("gradient", "closed_form"):
        sweep(tmp_path / "linear" / solver, {"vicreg": {}, "squared": {}, "barlow": {}}, solver=solver)
    panels = figures.linear_regime(figures.finished_runs(tmp_path / "linear")).axes
    assert [axes.get_title() for axes in panels] == ["VICReg", "spectral contrastive", "Barlow Twins"]
    for axes in panels:
        line = axes.get_lines()[0]
        np.testing.assert_allclose(line.get_ydata(), [4.6, 3.6])
        assert line.get_marker() == "o"  # two epochs
        np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), [0.6, 0.6])


def test_labels_of_figures_use_options_of_runs(tmp_path: Path) -> None:
    other = {"classes": 4, "alpha": 7.0}
    for gamma in (1.0, 50.0):
        sweep(tmp_path, {"vicreg": {"gamma": gamma}}, **other, dataset__subset=100, K=32)
    sweep(tmp_path, {"simclr": {"tau": 0.5}, "barlow": {"alpha": 0.02}}, classes=4, dataset__subset=100, K=32)
    runs = figures.finished_runs(tmp_path)
    figure = figures.rank_vs_gamma(runs)
    left, _, _ = figure.axes
    assert "(4 classes), K = 32" in figure.get_suptitle()
    assert left.get_xlabel() == "γ (α = 7)"
    assert left.get_lines()[0].get_ydata()[-1] == 3  # as many as the centred classes
    assert "positive eigenvalues of G: 4" in left.get_legend_handles_labels()[1]
    [axes] = figures.low_label(runs).axes
    assert axes.get_xlabel() == "γ (α = 7)"
    assert "γ = α: rank falls to 3 (closed form)" in axes.get_legend_handles_labels()[1]


def test_aligned_vs_misaligned_draws_every_gamma(tmp_path: Path) -> None:
    noisy = {"relation___target_": "ssl_runner.relation.builders.Rewired", "relation__rewire_fraction": 0.5}
    gammas = [1.0, 5.0, 25.0, 100.0, 400.0]
    for solver in ("gradient", "closed_form"):
        for gamma in gammas:
            sweep(tmp_path / solver / str(gamma), {"vicreg": {"gamma": gamma}}, solver=solver, **noisy)
        sweep(tmp_path / solver, {"simclr": {}, "barlow": {}}, solver=solver, **noisy)
    for axes in figures.aligned_vs_misaligned(figures.finished_runs(tmp_path)).axes:
        assert axes.get_legend_handles_labels()[1][:5] == [f"VICReg, γ = {gamma:g}" for gamma in gammas]
        lines = [container[0] for container in axes.containers]
        assert len({line.get_color() for line in lines}) == 7
        assert all(line.get_marker() in "os^" for line in lines)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5"]


@pytest.mark.parametrize(
    ("picture", "lost", "settings", "message"),
    [
        (
            "rank_vs_gamma",
            "spectrum.csv",
            {},
            "other/spectrum.csv: expected a column Z; repeat the run with diagnostics.every=1",
        ),
        (
            "linear_regime",
            "moments_loss",
            {},
            "expected a column moments_loss; repeat the run with experiment=linear_regime",
        ),
        ("rank_vs_gamma", None, {"K": 32}, "K=64 and 32"),
        ("low_label", None, {"classes": 4}, "classes=10 and 4"),
        ("low_label", None, {"alpha": 3.0}, "alpha=25.0 and 3.0"),
        ("aligned_vs_misaligned", None, {"projector__K": 5}, "projector.K=64.0 and 5.0"),
    ],
)
def test_figures_reject_incompatible_runs(
    picture: str, lost: str | None, settings: dict, message: str, tmp_path: Path
) -> None:
    noisy = {
        "relation___target_": "ssl_runner.relation.builders.Rewired",
        "relation__rewire_fraction": 0.5,
        "alpha": 25.0,
        "gamma": 1.0,
        "tau": 0.5,
    }
    for solver in ("gradient", "closed_form"):
        for loss in TARGETS:
            write_run(tmp_path / solver / loss, loss, 0.5, solver, seed=0, dataset__subset=100, **noisy)
    other = tmp_path / "other"
    write_run(other, "vicreg", 0.5, **({"seed": 1, "dataset__subset": 100} | noisy | settings))
    if lost == "spectrum.csv":
        (other / lost).unlink()
    elif lost:
        pd.read_csv(other / "metrics.csv").drop(columns=lost).to_csv(other / "metrics.csv", index=False)
    with pytest.raises(UsageError) as refused:
        figures.DRAW[picture](figures.finished_runs(tmp_path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_low_label_rejects_run_without_linear_probe(tmp_path: Path) -> None:
    for loss in TARGETS:
        write_run(tmp_path / loss, loss, 0.5, seed=0, dataset__subset=100, alpha=25.0, gamma=1.0)
        probe = pd.read_csv(tmp_path / loss / "probe.csv")
        probe.assign(probe="knn").to_csv(tmp_path / loss / "probe.csv", index=False)
    with pytest.raises(
        UsageError, match=r"vicreg: expected top1\.backbone; repeat the run with probe\.probes=\[linear\]"
    ):
        figures.low_label(figures.finished_runs(tmp_path))
    write_run(tmp_path / "with", "vicreg", 0.5, seed=1, dataset__subset=100, alpha=25.0, gamma=1.0)
    with pytest.raises(UsageError, match=r"vicreg: expected top1\.backbone"):
        figures.low_label(figures.finished_runs(tmp_path))


def test_views_shows_means_and_seeds_with_two_views_in_every_panel(tmp_path: Path) -> None:
    """A row per data set, which a folder of images names itself; seeds are drawn near their V."""
    tops = {"time": {2: 0.5, 4: 0.6}, "rows": {4: 0.7}, "images": {4: 0.8}}
    for (name, root), normalized in zip(
        (("folder", "/x/birds"), ("digits", None)), (True, False), strict=True
    ):
        for arm, seed in itertools.product(tops, (0, 1, 2)):
            for V, top1 in tops[arm].items():
                folder = tmp_path / f"{name}{arm}{V}{seed}"
                options = {"dataset__name": name, "dataset__root": root, "relation__normalized": normalized}
                write_run(folder, "vicreg", top1 + 0.1 * (seed - 1), seed=seed, V=V, **options)
                choices = f"hydra:\n  runtime:\n    choices:\n      experiment: views_{arm}\n"
                (folder / ".hydra" / "hydra.yaml").write_text(choices)
    panels = figures.views(figures.finished_runs(tmp_path)).axes
    assert [panel.get_title().partition(":")[0] for panel in panels] == ["birds"] * 3 + ["digits"] * 3
    for panel, top1 in zip(panels, (0.7, 0.8, 0.6) * 2, strict=True):
        mean, points = (line for line in panel.get_lines() if len(line.get_xdata()))
        assert mean.get_xdata().tolist() == [2, 4]
        np.testing.assert_allclose(mean.get_ydata(), [0.5, top1])
        np.testing.assert_allclose(
            sorted(points.get_ydata()), sorted([0.4, 0.5, 0.6, top1 - 0.1, top1, top1 + 0.1])
        )
        np.testing.assert_allclose(np.abs(np.log2(points.get_xdata()) % 1 - 0.5), 0.5, atol=0.05)
        assert panel.get_xticks().tolist() == [2, 4]
    assert panels[0].get_lines()[0].get_color() != panels[3].get_lines()[2].get_color()
    assert panels[2].get_legend_handles_labels()[1] == ["VICReg", "VICReg, rows of G sum to 1"]


def test_command_writes_picture_or_fails_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_experiment.py", "low_label", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        figures.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    sweep(tmp_path, {"vicreg": {"gamma": 1.0}}, dataset__subset=100, alpha=25.0)
    with pytest.raises(UsageError, match="SimCLR: expected at least one finished run"):
        figures.low_label(figures.finished_runs(tmp_path))
    sweep(tmp_path, {"simclr": {}, "barlow": {}}, dataset__subset=100)
    figures.main()
    picture = Path(capsys.readouterr().out.strip())
    assert picture == tmp_path / "low_label.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(
        sys,
        "argv",
        ["plot_experiment.py", "low_label", str(tmp_path), "--out", str(tmp_path / "new" / "mine.png")],
    )
    figures.main()
    assert (tmp_path / "new" / "mine.png").is_file()
    monkeypatch.setattr(
        sys, "argv", ["plot_experiment.py", "low_label", str(tmp_path), "--out", str(tmp_path / "mine.xyz")]
    )
    with pytest.raises(SystemExit):
        figures.main()
    err = capsys.readouterr().err
    assert "mine.xyz: expected a writable .png, .pdf or .svg file" in err
    assert err.count("\n") == 1


def test_run_of_earlier_version_is_rejected(tmp_path: Path) -> None:
    write_run(tmp_path / "old", "vicreg", 0.5, seed=0, solver__name="gradient")
    path = tmp_path / "old" / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("  _target_: ssl_runner.train.Pretraining\n", ""))
    with pytest.raises(UsageError, match="old: expected a run of this version"):
        figures.finished_runs(tmp_path)


def test_ranks_of_a_path_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Path of 8 rows: 4 positive eigenvalues; its Laplacian has the eigenvalues 2 - 2 cos(pi k / 8)."""
    monkeypatch.setattr(plot_rank, "K", 7)
    monkeypatch.setattr(plot_rank, "TAUS", [0.1, 0.5, 2.0])
    monkeypatch.setattr(plot_rank, "GAMMAS", [0.2, 1.0, 5.0])
    left, right = plot_rank.draw(Edges(torch.arange(7), torch.arange(1, 8), 8)).axes
    values = 2 - 2 * np.cos(np.pi * np.arange(1, 8) / 8)
    expected = [(7 * gamma * values < 8).sum() for gamma in (0.2, 1.0, 5.0)]
    assert list(left.lines[0].get_ydata()) == expected
    assert list(right.lines[0].get_ydata()) == [4, 3, 2]
    assert [list(ax.lines[1].get_ydata()) for ax in (left, right)] == [[4, 4]] * 2
