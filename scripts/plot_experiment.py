"""Draw the figure of an experiment: python scripts/plot_experiment.py EXPERIMENT FOLDER.

FOLDER holds the runs that the header of conf/experiment/EXPERIMENT.yaml starts. The script is in the source
tree only, not in the installed package.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_runner.errors import UsageError
from ssl_runner.loss import VICReg
from ssl_runner.relation import Labels
from ssl_runner.report.read import number, read_runs
from ssl_runner.theory import optimum

COLOURS = {
    "VICReg": "#1b6ca8",
    "SimCLR": "#c8553d",
    "SpectralContrastive": "#b07d12",
    "BarlowTwins": "#3a7d44",
}
NAMES = {
    "VICReg": "VICReg",
    "SimCLR": "SimCLR",
    "SpectralContrastive": "spectral contrastive",
    "BarlowTwins": "Barlow Twins",
}
OF_GAMMA = ("#56b4e9", COLOURS["VICReg"], "#7b4fa3", "#cc79a7", "#1b1b1c")  # of lines of one gamma each
FEW = 12  # measured points, up to which a line has markers
MADE_BY = {  # column -> option that makes ssl-run write it
    "Z": "diagnostics.every=1",
    "moments_loss": "experiment=linear_regime",
    "top1.backbone": "probe.probes=[linear]",
}
STYLES = {  # loss and relation.normalized -> colour, line and marker in the figure of views
    ("VICReg", False): (COLOURS["VICReg"], "-", "o"),
    ("VICReg", True): ("#7b4fa3", "--", "D"),
    ("SimCLR", False): (COLOURS["SimCLR"], "-", "s"),
    ("BarlowTwins", False): (COLOURS["BarlowTwins"], "-", "^"),
}
ARMS = {  # experiment -> title
    "views_rows": "equal rows in a batch and epochs",
    "views_images": "equal images in a batch and epochs",
    "views_time": "equal rows in a batch and steps (equal time)",
}
USED = 0.1  # a direction of Z counts as used if its singular value exceeds this fraction of the largest


def main() -> None:
    """Parse the command line and draw the figure. Prints one line and exits with 1 on invalid input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=sorted(DRAW))
    parser.add_argument("folder", type=Path, help="folder with the runs of the experiment")
    parser.add_argument("--out", type=Path, help="output file (default: FOLDER/EXPERIMENT.png)")
    args = parser.parse_args()
    matplotlib.use("Agg")
    path = args.out or args.folder / f"{args.experiment}.png"
    try:
        save(DRAW[args.experiment](finished_runs(args.folder)), path)
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(path)


def save(figure: Figure, path: Path) -> None:
    """Write the figure to `path`. Raises UsageError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--out={path}: expected a writable .png, .pdf or .svg file ({error}); give another one"
        ) from error


def finished_runs(folder: Path) -> pd.DataFrame:
    """All finished runs below `folder`, one row per run.

    Columns: `path`, the `experiment`, all options by dotted name, `loss_name`, `solver`, the number of
    `classes`, the last row of metrics.csv as `metrics.*`, and test top-1 of the linear probe as
    `top1.<features>`. Raises UsageError if no run has finished.
    """
    rows = []
    for run in read_runs([folder], without=folder / "report"):
        if run.status != "done":
            continue
        if not {"loss._target_", "solver._target_"} <= run.config.keys() or "classes" not in run.record:
            raise UsageError(f"{run.path}: expected a run of this version of ssl_runner; repeat it")
        row: dict[str, Any] = {"path": run.path, "classes": len(run.record["classes"])}
        row |= {"experiment": run.choices.get("experiment")}
        row |= {key: None if value == "null" else number(value) for key, value in run.config.items()}
        row |= {"loss_name": run.config["loss._target_"].rpartition(".")[2]}
        row |= {"solver": run.config["solver._target_"].rpartition(".")[2]}
        row |= {f"metrics.{name}": value for name, value in run.last.items()}
        tests = [p for p in run.probes if (p["eval_split"], p["probe"]) == ("test", "linear")]
        rows.append(row | {f"top1.{probe['features']}": probe["top1"] for probe in tests})
    if not rows:
        raise UsageError(f"{folder}: expected a finished run; give the folder of the experiment's runs")
    return pd.DataFrame(rows)


def read(path: Path, column: str) -> pd.DataFrame:
    """Read a CSV file of a run. Raises UsageError if the file or the column is missing."""
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    if column not in table:
        raise UsageError(f"{path}: expected a column {column}; repeat the run with {MADE_BY[column]}")
    return table


def single(runs: pd.DataFrame, option: str) -> Any:
    """Return the value of an option that all runs share. Raises UsageError if they differ."""
    values = list(runs[option].unique()) if option in runs else []
    if len(values) != 1:
        given = " and ".join(map(str, values)) or "null"
        raise UsageError(
            f"{option}={given}: expected the same value in all runs; give a folder whose runs share it"
        )
    return values[0]


def spread(runs: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean, standard deviation and count of a column over seeds, for each value of `by`."""
    return runs.groupby(by)[value].agg(["mean", "std", "count"]).fillna({"std": 0.0}).sort_index()


def curve(axes: Axes, runs: pd.DataFrame, by: str, value: str, label: str, **style: object) -> None:
    """Draw the mean over seeds with error bars of one standard deviation."""
    table = spread(runs, by, value)
    x, mean, std = (column.to_numpy(float) for column in (table.index, table["mean"], table["std"]))
    axes.errorbar(x, mean, std, label=label, capsize=3, **style)  # type: ignore[arg-type]


def ticks(axes: Axes, values: Iterable[float]) -> None:
    """Set the ticks of the x axis to the values that were run."""
    run = sorted(set(values))
    axes.set_xticks(run, [f"{value:g}" for value in run], fontsize=8)
    axes.minorticks_off()


def seeds(runs: pd.DataFrame) -> str:
    """Part of a figure title that explains the error bars."""
    return f"mean ± standard deviation over {runs.seed.nunique()} seeds"


def of(runs: pd.DataFrame, loss: str, column: str = "path") -> pd.DataFrame:
    """Select the runs of one loss. Raises UsageError if there is none or one of them lacks `column`."""
    chosen = runs[runs.loss_name == loss]
    if chosen.empty:
        raise UsageError(
            f"{NAMES[loss]}: expected at least one finished run; run all commands of the experiment file"
        )
    lacking = chosen.path[chosen[column].isna()] if column in chosen else chosen.path
    if len(lacking):
        raise UsageError(f"{lacking.iloc[0]}: expected {column}; repeat the run with {MADE_BY[column]}")
    return chosen


def canvas(widths: list[float], title: str) -> tuple[Figure, list[Axes]]:
    """Create a figure with one row of axes of the given relative widths."""
    figure = Figure(figsize=(5.2 * sum(widths), 4.2), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    figure.suptitle(title, fontsize=11)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def rank_vs_gamma(runs: pd.DataFrame) -> Figure:
    """Number of used directions and singular values of Z, compared with the closed form."""
    spectra = {path: read(path / "spectrum.csv", "Z") for path in runs.path}
    runs["K"] = [len(spectra[path]) for path in runs.path]
    runs["used"] = [int((USED * spectra[path].Z.max() < spectra[path].Z).sum()) for path in runs.path]
    vicreg = of(runs, "VICReg")
    vicreg = vicreg[vicreg.gamma > 0]  # logarithmic axis
    K, classes, alpha = int(single(runs, "K")), int(single(runs, "classes")), float(single(vicreg, "alpha"))
    N = int(single(runs, "V") * single(runs, "diagnostics.num_images"))
    figure, (left, middle, right) = canvas(
        [1, 0.6, 1],
        f"Used directions of Z, relation of labels ({classes} classes), K = {K}; {seeds(runs)}",
    )
    gammas = np.geomspace(vicreg.gamma.min() / 1.3, vicreg.gamma.max() * 1.3, 400)
    G = Labels(torch.arange(N) % classes, normalized=True)
    ranks = [optimum(VICReg(alpha, alpha, gamma, variance="squared"), G, K).rank for gamma in gammas]
    left.plot(gammas, ranks, color=COLOURS["VICReg"], lw=1, ls="--", label="VICReg, closed form")
    curve(left, vicreg, "gamma", "used", "VICReg, trained", color=COLOURS["VICReg"], fmt="o")
    left.set(
        xscale="log",
        xlabel=f"γ (α = {alpha:g})",
        ylabel=f"singular values of Z above {USED:.0%} of the largest",
    )
    ticks(left, vicreg.gamma)
    names: list[str] = []
    for loss, option, symbol, marker in (("SimCLR", "tau", "τ", "s"), ("BarlowTwins", "alpha", "α", "^")):
        for value, group in of(runs, loss).groupby(option):
            mean, std = group.used.mean(), group.used.std()
            middle.errorbar([len(names)], [mean], [std], fmt=marker, color=COLOURS[loss], capsize=3)
            names.append(f"{NAMES[loss].split()[0]}\n{symbol} = {value:g}")
    middle.set_xticks(range(len(names)), names, fontsize=8)
    middle.set_xlim(-0.5, len(names) - 0.5)
    for ax in (left, middle):
        ax.axhline(classes, color="gray", lw=1, ls=":", label=f"positive eigenvalues of G: {classes}")
        ax.set_ylim(0, 1.1 * K)
    left.set_title("VICReg", fontsize=9)
    middle.set_title("SimCLR and Barlow Twins", fontsize=9)
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.02, 0.2))
    shown = sorted(vicreg.gamma.unique())
    shown = sorted({shown[0], *[g for g in shown if 10 <= g <= 20], shown[-1]})
    blues = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(shown)))
    for gamma, colour in zip(shown, blues, strict=True):
        paths = vicreg.path[vicreg.gamma == gamma]
        Z = np.stack([spectra[path].Z.to_numpy() for path in paths])
        closed = spectra[paths.iloc[0]].closed_form
        k = np.arange(1, K + 1)
        right.errorbar(
            k,
            Z.mean(0),
            Z.std(0, ddof=min(1, len(Z) - 1)),
            fmt="o",
            ms=2.5,
            lw=0.6,
            color=colour,
            label=f"γ = {gamma:g}",
        )
        right.plot(k, closed, color=colour, lw=1, ls="--")
    right.plot([], [], color="gray", lw=1, ls="--", label="closed form")
    right.set(
        xlabel="k",
        ylabel="k-th singular value of Z / √N",
        title="VICReg (points: trained, lines: closed form)",
    )
    right.title.set_fontsize(9)
    right.set_ylim(-0.05, 1.65)
    right.legend(fontsize=8, ncols=2, loc="upper right")
    return figure


def aligned_vs_misaligned(runs: pd.DataFrame) -> Figure:
    """Probe accuracy against the fraction of rewired pairs: linear closed form and trained network."""
    figure, axes = canvas([1, 1], f"Relation of labels, fraction p of pairs rewired; {seeds(runs)}")
    for ax, solver in zip(axes, ("ClosedForm", "Pretraining"), strict=True):
        some = runs[(runs.solver == solver) & runs["relation._target_"].str.endswith("Rewired")]
        vicreg, simclr, barlow = (
            of(some, loss, "top1.backbone") for loss in ("VICReg", "SimCLR", "BarlowTwins")
        )
        gammas = sorted(vicreg.gamma.unique())
        lines = zip(gammas, cycle(OF_GAMMA), cycle(("-", "--", ":", "-.")), strict=False)
        for gamma, colour, style in lines:
            group = vicreg[vicreg.gamma == gamma]
            curve(
                ax,
                group,
                "relation.rewire_fraction",
                "top1.backbone",
                f"VICReg, γ = {gamma:g}",
                color=colour,
                ls=style,
                marker="o",
            )
        curve(
            ax,
            simclr,
            "relation.rewire_fraction",
            "top1.backbone",
            "SimCLR",
            color=COLOURS["SimCLR"],
            marker="s",
        )
        curve(
            ax,
            barlow,
            "relation.rewire_fraction",
            "top1.backbone",
            "Barlow Twins",
            color=COLOURS["BarlowTwins"],
            marker="^",
        )
        if solver == "ClosedForm" and "top1.lda" in runs:
            lda = float(runs["top1.lda"].dropna().iloc[0])
            ax.axhline(lda, color="gray", lw=1, ls="--", label=f"LDA (scikit-learn): {lda:.3f}")
        ax.set(xlabel="p, fraction of rewired pairs", ylabel="linear probe, test top-1", title=model(some))
        ticks(ax, some["relation.rewire_fraction"])
        low = float(some["top1.backbone"].min())
        ax.set_ylim(0 if low < 0.5 else low - 0.1, 1)
        ax.title.set_fontsize(9)
        ax.legend(fontsize=8, loc="lower left")
    return figure


def model(runs: pd.DataFrame) -> str:
    """Title of a panel: backbone, solver and K of the runs."""
    backbone, solver = single(runs, "backbone._target_").rpartition(".")[2], single(runs, "solver")
    K = single(runs, "backbone.width" if (backbone, solver) == ("linear", "ClosedForm") else "projector.K")
    name = "linear model" if backbone == "linear" else backbone
    solved = {"ClosedForm": "closed form", "Pretraining": "gradient descent"}[solver]
    return f"{name}, {solved}, K = {K:g}"


def low_label(runs: pd.DataFrame) -> Figure:
    """Probe accuracy against gamma with few labelled images."""
    sizes = sorted(runs["dataset.subset"].dropna().unique())
    if not sizes:
        raise UsageError(
            "dataset.subset=null: expected runs with a number; run all commands of the experiment file"
        )
    figure, axes = canvas([1] * len(sizes), f"Relation of labels, few labelled images; {seeds(runs)}")
    classes = single(runs, "classes")
    for ax, size in zip(axes, sizes, strict=True):
        some = runs[runs["dataset.subset"] == size]
        vicreg = of(some, "VICReg", "top1.backbone")
        alpha = float(single(vicreg, "alpha"))
        curve(ax, vicreg, "gamma", "top1.backbone", "VICReg", color=COLOURS["VICReg"], marker="o")
        for loss in ("SimCLR", "BarlowTwins"):
            top1 = of(some, loss, "top1.backbone")["top1.backbone"]
            ax.axhline(
                top1.mean(),
                color=COLOURS[loss],
                lw=1.2,
                label=f"{NAMES[loss]} ({top1.mean():.3f} ± {top1.std():.3f})",
            )
            ax.axhspan(
                top1.mean() - top1.std(), top1.mean() + top1.std(), color=COLOURS[loss], alpha=0.12, lw=0
            )
        ax.axvline(
            alpha, color="gray", lw=1, ls=":", label=f"γ = α: rank falls to {classes - 1} (closed form)"
        )
        ax.set(
            xscale="log",
            xlabel=f"γ (α = {alpha:g})",
            ylabel="linear probe, test top-1",
            title=f"{size:g} labelled images",
        )
        ticks(ax, vicreg.gamma)
        ax.set_ylim(max(0, runs["top1.backbone"].min() - 0.15), 1)
        ax.title.set_fontsize(9)
        ax.legend(fontsize=8, loc="lower center")
    return figure


def linear_regime(runs: pd.DataFrame) -> Figure:
    """Loss of the linear model against epochs, and the loss of the closed form.

    Both are computed over all rows used for the moments.
    """
    losses = ["VICReg", "SpectralContrastive", "BarlowTwins"]
    figure, axes = canvas([1, 1, 1], f"Linear model Z = XW: gradient descent and closed form; {seeds(runs)}")
    for ax, loss in zip(axes, losses, strict=True):
        some = of(runs, loss)
        trained, solved = some[some.solver == "Pretraining"], some[some.solver == "ClosedForm"]
        if trained.empty or solved.empty:
            raise UsageError(
                f"{NAMES[loss]}: expected runs of both solvers; run all commands of the experiment file"
            )
        tables = pd.concat([read(path / "metrics.csv", "moments_loss") for path in trained.path])
        table = tables.groupby("epoch").moments_loss.agg(["mean", "std"])
        marker = "o" if len(table) <= FEW else None
        ax.plot(table.index, table["mean"], color=COLOURS[loss], marker=marker, label="gradient descent")
        ax.fill_between(
            table.index,
            table["mean"] - table["std"],
            table["mean"] + table["std"],
            color=COLOURS[loss],
            alpha=0.2,
        )
        floor, kind = solved["metrics.loss"].mean(), solved["metrics.loss_kind"].iloc[0]
        ax.axhline(floor, color="black", lw=1, ls="--", label=f"closed form, {kind}")
        ax.set(
            xscale="log", xlabel="epoch", ylabel="loss over all rows used for the moments", title=NAMES[loss]
        )
        ax.title.set_fontsize(9)
        ax.legend(fontsize=8)
    return figure


def views(runs: pd.DataFrame) -> Figure:
    """Probe accuracy against the number of views: a row per data set, a column per quantity that is equal.

    Lines are means over seeds, and points single seeds, beside each other for different losses. The runs with
    V = 2 of views_time are those of views_rows and views_images as well.
    """
    runs = runs.dropna(subset="experiment")
    runs["data"] = runs["dataset.name"]
    if "dataset.root" in runs:  # a folder's name says more than "folder"
        runs["data"] = runs["dataset.root"].map(lambda root: Path(root).name, "ignore").fillna(runs["data"])
    sets = sorted(runs["data"].unique())
    runs["kind"] = list(zip(runs.loss_name, runs["relation.normalized"] == "true", strict=True))
    kinds = sorted(set(runs.kind))
    figure = Figure(figsize=(12, 3.6 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), len(ARMS), squeeze=False, sharex=True, sharey="row")
    figure.suptitle("Number of views V: means over seeds (lines) and single seeds (points)", fontsize=11)
    for line, name in zip(axes, sets, strict=True):
        for ax, (arm, title) in zip(line, ARMS.items(), strict=True):
            for place, kind in enumerate(kinds):
                some = runs[(runs["data"] == name) & ((runs.experiment == arm) | (runs.V == 2))]
                some = some[some.kind == kind]
                means, style = spread(some, "V", "top1.backbone")["mean"], STYLES[kind]
                ax.plot(means.index, means, color=style[0], ls=style[1])
                beside = some.V * 1.04 ** (place - (len(kinds) - 1) / 2)
                ax.plot(beside, some["top1.backbone"], style[2], color=style[0], ms=5, alpha=0.6)
            ax.set(xscale="log", title=f"{name}: {title}")
            ticks(ax, runs.V)
            ax.title.set_fontsize(9)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("linear probe, test top-1")
    for ax in axes[-1]:
        ax.set_xlabel("V, views per image")
    for loss, normalized in kinds:
        colour, dash, marker = STYLES[loss, normalized]
        label = NAMES[loss] + ", rows of G sum to 1" * normalized
        axes[0, -1].plot([], [], marker, color=colour, ls=dash, ms=5, label=label)
    axes[0, -1].legend(fontsize=8)
    return figure


DRAW: dict[str, Callable[[pd.DataFrame], Figure]] = {
    draw.__name__: draw for draw in (rank_vs_gamma, aligned_vs_misaligned, low_label, linear_regime, views)
}


if __name__ == "__main__":
    main()
