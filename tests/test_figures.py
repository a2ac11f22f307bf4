"""The experiments' pictures show what the runs' files say."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from ssl_runner import figures
from ssl_runner.errors import Refused

TARGETS = {"vicreg": "VICReg", "simclr": "SimCLR", "squared": "SquaredSimCLR", "barlow": "BarlowTwins"}


def write_run(folder: Path, loss: str, top1: float, solver: str = "gradient", status: str = "done", **settings: object) -> None:
    (folder / ".hydra").mkdir(parents=True)
    config = OmegaConf.create({"loss": {"_target_": f"ssl_runner.loss.{TARGETS[loss]}"}, "solver": {"name": solver}})
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    (folder / "run.json").write_text(json.dumps({"status": status}))
    metrics = {
        "epoch": [1, 2],
        "seconds": [1.0, 2.0],
        "loss": [3.0, top1],
        "loss_is": "exact",
        "moments_loss": [4 + top1, 3 + top1],
    }
    pd.DataFrame(metrics).to_csv(folder / "metrics.csv", index=False)
    probe = {"probe": ["linear", "linear"], "features": "backbone", "eval_split": ["val", "test"], "top1": [0.0, top1]}
    pd.DataFrame(probe).to_csv(folder / "probe.csv", index=False)
    Z = np.where(np.arange(64) < 20, 1.0, 0.05) if loss == "vicreg" else np.where(np.arange(64) < 9, 2.0, 0.1)
    spectrum = {"k": np.arange(1, 65), "Z": Z, "closed_form": 0.5}
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


def test_low_label_shows_the_mean_over_seeds(tmp_path: Path) -> None:
    for gamma in (1.0, 10.0):
        sweep(tmp_path, {"vicreg": {"gamma": gamma}}, dataset__subset=100, alpha=25.0)
    sweep(tmp_path, {"simclr": {"tau": 0.5}, "barlow": {}}, dataset__subset=100)
    write_run(tmp_path / "failed", "vicreg", 0.0, status="failed", seed=9, gamma=10.0, dataset__subset=100)
    [axes] = figures.low_label(figures.read_runs(tmp_path)).axes
    x, y = points(axes, "VICReg")
    assert list(x) == [1.0, 10.0]
    np.testing.assert_allclose(y, [0.6, 0.6])
    assert "SimCLR (0.600 ± 0.100)" in axes.get_legend_handles_labels()[1]


def test_rank_vs_gamma_counts_directions_above_a_tenth_of_the_largest(tmp_path: Path) -> None:
    for gamma in (1.0, 50.0):
        sweep(tmp_path, {"vicreg": {"gamma": gamma}}, projector__K=64, alpha=25.0)
    sweep(tmp_path, {"simclr": {"tau": 0.5}, "barlow": {"alpha": 0.02}}, projector__K=64)
    left, right = figures.rank_vs_gamma(figures.read_runs(tmp_path)).axes
    x, y = points(left, "VICReg, trained")
    assert (list(x), list(y)) == ([1.0, 50.0], [20, 20])
    line = left.get_lines()[0]
    assert line.get_ydata()[0] == 64
    assert line.get_ydata()[-1] == 9
    assert right.get_xlabel() == "k"


def test_aligned_vs_misaligned_and_linear_regime_draw_both_solvers(tmp_path: Path) -> None:
    for solver in ("gradient", "closed_form"):
        for p in (0.0, 1.0):
            noisy = {"relation__p": p, "relation___target_": "ssl_runner.relate.Noisy"}
            sweep(tmp_path / solver, {"vicreg": {"gamma": 25.0}, "simclr": {}, "barlow": {}}, solver=solver, **noisy)
    left, right = figures.aligned_vs_misaligned(figures.read_runs(tmp_path)).axes
    for axes in (left, right):
        for label in ("VICReg, γ = 25", "SimCLR", "Barlow Twins"):
            x, y = points(axes, label)
            assert list(x) == [0, 1]
            np.testing.assert_allclose(y, [0.6, 0.6])

    for solver in ("gradient", "closed_form"):
        sweep(tmp_path / "linear" / solver, {"vicreg": {}, "squared": {}, "barlow": {}}, solver=solver)
    for axes in figures.linear_regime(figures.read_runs(tmp_path / "linear")).axes:
        line = axes.get_lines()[0]
        np.testing.assert_allclose(line.get_ydata(), [4.6, 3.6])
        np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), [0.6, 0.6])


def test_the_command_writes_a_picture_or_says_why_not(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-plot", "low_label", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        figures.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    sweep(tmp_path, {"vicreg": {"gamma": 1.0}}, dataset__subset=100, alpha=25.0)
    with pytest.raises(Refused, match="no finished run of SimCLR"):
        figures.low_label(figures.read_runs(tmp_path))
    sweep(tmp_path, {"simclr": {}, "barlow": {}}, dataset__subset=100)
    figures.main()
    picture = Path(capsys.readouterr().out.strip())
    assert picture == tmp_path / "low_label.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
