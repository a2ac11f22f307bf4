"""Accuracy against training time of ssl_runner, lightly and stable-pretraining, in alternating processes."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import racers
from benchmarks.chart import plt

LOSSES = {"simclr": "SimCLR", "vicreg": "VICReg", "barlow": "Barlow Twins"}
SEEDS = (0, 1, 2)
NAME, EQUAL = "ssl_runner", "ssl_runner, lightly's images"  # in the table and the figure
RATE = 1.5  # steps per second assumed for the length of stable-pretraining's schedule


def racer(
    tool: str, loss: str, seed: int, seconds: float, marks: list[float], label: str = "", **given: Any
) -> list[dict[str, Any]]:
    """Train in a separate process. Returns one row per mark. Raises RuntimeError if the process fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        task = {
            "tool": tool,
            "loss": loss,
            "seed": seed,
            "seconds": seconds,
            "marks": marks,
            "out": str(out),
            **given,
        }
        command = [sys.executable, "-m", "benchmarks.racers", json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{tool} {loss} seed {seed} failed: {done.stderr.strip().splitlines()[-1]}")
        rows = json.loads(out.read_text())
    about = {"work": LOSSES[loss], "tool": label or tool, "seed": seed, "budget": seconds}
    return [about | row | {"views_per_s": row["V"] * row["images"] / row["seconds"]} for row in rows]


def run(
    device: torch.device,
    full: bool,
    data: Path,
    out: Path,
    seconds: float | None = None,
    experiment: str | None = None,
) -> list[dict[str, Any]]:
    """One row per loss, tool, seed and mark.

    Peers train for T = `seconds`, by default 60 or 300 (`full`), stable-pretraining with one seed only.
    ssl_runner trains for T / 3 seconds, or T if `seconds` is given, and once more for the number of images
    that lightly has processed, to separate the recipe from the throughput. `experiment` of conf/ sets the
    options of ssl_runner, except data set, loss, seed, device and batch size. Raises UsageError if it sets an
    option that one of the losses does not have.
    """
    T = seconds or (300.0 if full else 60.0)
    shared: dict[str, Any] = {"data": str(data.resolve()), "device": str(device), "workers": 2}
    ours = shared | {"experiment": experiment}
    for loss in LOSSES:
        racers.settings(ours | {"loss": loss, "seed": SEEDS[0]})
    budget = seconds or T / 3
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        for loss in LOSSES:
            rows += racer("ours", loss, seed, budget, [budget / 2, budget], label=NAME, **ours)
            rows += racer("lightly", loss, seed, T, [T / 3, T], **shared)
            rows += racer("ours", loss, seed, T, [math.inf], label=EQUAL, images=rows[-1]["images"], **ours)
            if seed == SEEDS[0]:
                rows += racer("stable-pretraining", loss, seed, T, [T / 3, T], steps_per_s=RATE, **shared)
            pd.DataFrame(rows).to_csv(out / "race.csv", index=False)
            print(f"seed {seed}, {LOSSES[loss]}: done", flush=True)
    return rows


def draw(rows: pd.DataFrame, path: Path) -> None:
    """One panel per loss and probe: means over seeds as large markers, single seeds as small ones."""
    rows = rows[rows.tool != EQUAL]
    figure, panels = plt.subplots(
        2, len(LOSSES), figsize=(11, 6), sharex=True, sharey="row", layout="constrained"
    )
    for column, loss in enumerate(LOSSES.values()):
        for line, measured in enumerate(("linear", "knn")):
            axes = panels[line, column]
            for color, (tool, of_tool) in enumerate(rows[rows.work == loss].groupby("tool", sort=False)):
                mean = of_tool.groupby(of_tool.groupby("seed").cumcount())[["seconds", measured]].mean()
                axes.plot(mean.seconds, mean[measured], "o-", color=f"C{color}", label=tool)
                axes.scatter(of_tool.seconds, of_tool[measured], color=f"C{color}", s=10, alpha=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0, column].set_title(loss)
        panels[1, column].set_xlabel("training time (s)")
    panels[0, 0].set_ylabel("linear probe, test top-1")
    panels[1, 0].set_ylabel("kNN, test top-1")
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
