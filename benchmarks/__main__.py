"""scripts/bench [GROUP ...]: each group times ours and its peers on the same work, and writes GROUP.csv and GROUP.png."""

import argparse
import importlib
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks import measure, picture
from ssl_runner.device import keep_freed_memory

GROUPS = {
    "views": "random views of images, a core: torchvision on PIL, kornia",
    "loss": "forward and backward of the losses: lightly, stable-pretraining",
    "step": "what a training step adds to the bare forward and backward, and torch.compile",
    "probe": "the linear probes: SGD as the peers do it, scikit-learn",
    "startup": "from the shell to the first step",
    "growth": "time and memory against N, K, V, image and data-set size",
    "paper": "FLOPs and bytes of a step of resnet18 at batch 512, counted, and the floor that they set on an H100",
    "race": "accuracy against seconds of training: lightly, stable-pretraining",
}


def main() -> None:
    listed = "\n".join(f"  {name:9}{what}" for name, what in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=f"{__doc__}\n\ngroups (all of them by default):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="one or more of those above")
    parser.add_argument("--full", action="store_true", help="more sizes, more rounds, a longer race")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--data", type=Path, help="folder with train/<class>/* and test/<class>/*, for the race"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="where CSVs and pictures go")
    given = parser.parse_args()
    unknown = set(given.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: this machine has no CUDA device; give cpu")
    groups = given.groups or list(GROUPS)
    if "race" in groups and given.data is None:
        if given.groups:
            parser.error("the race needs images: give --data FOLDER with train/<class>/* and test/<class>/*")
        groups.remove("race")
        print("without --data no race")
    given.out.mkdir(parents=True, exist_ok=True)
    if device.type == "cpu":
        keep_freed_memory()  # as a run does; for all contenders
    print(measure.describe(device))
    for name in groups:
        start = time.perf_counter()
        group = importlib.import_module(f"benchmarks.{name}")
        rows = pd.DataFrame(group.run(device=device, full=given.full, data=given.data, out=given.out))
        rows.to_csv(given.out / f"{name}.csv", index=False)
        getattr(group, "draw", picture.bars)(rows, given.out / f"{name}.png")
        print(f"\n{name}: {GROUPS[name]} ({time.perf_counter() - start:.0f} s)")
        print(rows.to_string(index=False, float_format=lambda number: f"{number:.4g}"))


if __name__ == "__main__":
    main()
