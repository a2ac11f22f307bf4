"""scripts/bench [GROUP ...]: time ssl_runner and peer libraries on the same work.

Each group writes GROUP.csv and GROUP.png to the output folder.
"""

import argparse
import importlib
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

from benchmarks import chart, measure
from ssl_runner import numerics
from ssl_runner.device import keep_freed_memory

GROUPS = {
    "views": "augmentation of images on one core: torchvision on PIL, kornia",
    "loss": "forward and backward pass of the losses: lightly, stable-pretraining",
    "step": "overhead of a training step over the bare forward and backward pass; torch.compile",
    "probe": "linear probes: SGD as in lightly, scikit-learn",
    "startup": "time from the shell to the first training step",
    "growth": "time and memory against N, K, V, image size and data set size",
    "paper": "FLOPs and bytes of a resnet18 step at batch size 512, and lower bounds on its time on an H100",
    "race": "accuracy against training time: lightly, stable-pretraining",
}
PEERS = {  # group -> peer libraries that it needs
    "views": ("kornia",),
    "loss": ("lightly", "stable_pretraining"),
    "step": ("lightly",),
    "probe": ("lightly", "pytorch_lightning"),
    "startup": ("lightly", "lightning", "stable_pretraining"),
    "race": ("lightly", "lightning", "stable_pretraining"),
}


def main() -> None:
    listed = "\n".join(f"  {name:9}{what}" for name, what in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=f"{__doc__}\ngroups (default: all):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="groups to run, see above")
    parser.add_argument("--full", action="store_true", help="more sizes, more rounds, a longer race")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--data", type=Path, help="image folder with train/<class>/* and test/<class>/*, required by race"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="race: time of each training (default: peers 60, or 300 with --full; ssl_runner a third)",
    )
    parser.add_argument(
        "--experiment", help="race: experiment with the settings of ssl_runner, except the data"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="output folder")
    given = parser.parse_args()
    unknown = set(given.groups) - set(GROUPS)
    if unknown:
        parser.error(f"GROUP={' '.join(sorted(unknown))}: expected one or more of {', '.join(GROUPS)}")
    if given.seconds is not None and not given.seconds > 0:
        parser.error(f"--seconds={given.seconds}: expected a number > 0; give the seconds of a training")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device={given.device}: expected a machine with a CUDA device; use --device cpu")
    groups = given.groups or list(GROUPS)
    for name in ("seconds", "experiment"):
        if getattr(given, name) is not None and "race" not in groups:
            parser.error(
                f"--{name}={getattr(given, name)}: expected the group race; leave it out, or add race"
            )
    if "race" in groups and given.data is None:
        if given.groups:
            parser.error(
                "GROUP=race: expected --data; give --data FOLDER with train/<class>/* and test/<class>/*"
            )
        groups.remove("race")
        print("race skipped: it requires --data")
    missing = sorted({peer for name in groups for peer in PEERS.get(name, ()) if find_spec(peer) is None})
    if missing:
        parser.error(
            f"GROUP={' '.join(groups)}: {', '.join(missing)} not found; run scripts/bench, which installs the"
            f" peers, or only {', '.join(name for name in GROUPS if name not in PEERS)}"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory(device)  # same allocator settings as in a run, for all contenders
    numerics.apply(device, "fp32", deterministic=False)  # likewise
    print(measure.describe(device))
    for name in groups:
        start = time.perf_counter()
        group = importlib.import_module(f"benchmarks.{name}")
        options = {"seconds": given.seconds, "experiment": given.experiment} if name == "race" else {}
        found = group.run(device=device, full=given.full, data=given.data, out=given.out, **options)
        rows = pd.DataFrame(found)
        rows.to_csv(given.out / f"{name}.csv", index=False)
        getattr(group, "draw", chart.bars)(rows, given.out / f"{name}.png")
        print(f"\n{name}: {GROUPS[name]} ({time.perf_counter() - start:.0f} s)")
        print(rows.to_string(index=False, float_format=lambda number: f"{number:.4g}"))


if __name__ == "__main__":
    main()
