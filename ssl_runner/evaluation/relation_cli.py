"""`ssl-relation`: does an augmentation fit the labels of a data set? Measured before any training."""

import math
from pathlib import Path
from typing import Any

from ssl_runner import console
from ssl_runner.config import arguments
from ssl_runner.errors import UsageError

DESCRIPTION = """\
Measure how much of the labels the relation that an augmentation induces can expose, without training: for the
views of the configuration, with each of their operations left out, and with each alone.
"""
EPILOG = """\
settings: dataset, views, V, backbone, init_weights, channels_last, seed and device, as of ssl-run
  ssl-relation dataset=cifar10 views=simclr
  ssl-relation dataset=folder dataset.root=FOLDER views=crop views.policies.all.crop.scale=[0.5,1]

Writes relation.csv and relation.png to the folder --out. For C classes, k is C - 1 and 2 (C - 1):
  energy_k  share of the label variance in the k directions that views preserve best, corrected for chance (0)
  area      mean of energy_1 to the last energy
  rho_k     correlation of two views of an image along direction k
The directions are linear functions of the features of the backbone, which is not trained.
"""
LEGEND = (
    "energy_k: share of the label variance in the k directions that views preserve best; area: mean of all"
    " energies;\nrho_k: correlation of two views of an image along direction k"
)
SETTABLE = ("dataset", "views", "V", "backbone", "init_weights", "channels_last", "seed", "device")


def parser() -> arguments.Parser:
    """Return the parser of the command line."""
    parser = arguments.Parser(prog="ssl-relation", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "overrides", metavar="SETTING", nargs="*", default=[], help="group=choice or key=value"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("relation"), help="folder to write (relation)")
    parser.add_argument("--images", type=int, default=20_000, help="labelled training images to use (20000)")
    parser.add_argument("--passes", type=int, default=3, help="passes over views of half of them (3)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    parser.add_argument("--config-dir", help="folder with configs of your own")
    return parser


def main() -> None:
    """Entry point of `ssl-relation`. Exit codes: 0, 1 after an error, 130 after Ctrl-C."""
    console.call(execute)


def execute() -> None:
    """Validate the command line, then measure every variant of the views."""
    args = parser().read()
    for option in ("images", "passes"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option}={getattr(args, option)}: expected an integer >= 1")
    table, chart = args.out / "relation.csv", args.out / "relation.png"
    for path in (table, chart):
        if path.exists() and not args.overwrite:
            raise UsageError(f"{path}: expected a new file; give another --out, or --overwrite")
    from ssl_runner.config import compose
    from ssl_runner.evaluation.finished import check_settable, compose_groups

    check_settable(compose.parse(args.overrides), SETTABLE, "leave it out, nothing is trained")
    cfg = compose_groups(args.overrides, args.config_dir)

    from ssl_runner import numerics
    from ssl_runner.device import choose_device, keep_freed_memory
    from ssl_runner.evaluation import relation_fit
    from ssl_runner.theory.label_fit import EqualViews

    device = choose_device(cfg.device)
    numerics.apply(device, "fp32", deterministic=False)
    keep_freed_memory(device)
    fit = relation_fit.RelationFit(cfg, device, images=args.images, passes=args.passes)
    rows: list[dict[str, Any]] = []
    for name, policies in fit.variants.items():
        try:
            columns = fit(policies)
        except EqualViews:
            if not rows:
                raise
            columns = dict.fromkeys(list(rows[0])[1:], math.nan)
        if not rows:
            print(relation_fit.line("views", columns))
        print(relation_fit.line(name, columns.values()), flush=True)
        rows.append({"views": name} | columns)
    if any(math.isnan(row["area"]) for row in rows):
        print("-: these operations do not change the images")
    args.out.mkdir(parents=True, exist_ok=True)
    relation_fit.write(rows, f"{cfg.dataset.name}, V = {cfg.V}", table, chart)
    print(LEGEND)
    print(f"written to {args.out}: {table.name}, {chart.name}", flush=True)
