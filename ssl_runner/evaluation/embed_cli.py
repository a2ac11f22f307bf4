"""`ssl-embed`: write the features of a trained network for a data set or a folder of images to a file."""

import re
import sys
from pathlib import Path
from typing import Any

from ssl_runner import console
from ssl_runner.config import arguments
from ssl_runner.config.rules import check_device
from ssl_runner.errors import UsageError, counted

DESCRIPTION = """\
Write the features of the trained network of a finished run to a file.

The images are those of the run's data set, of another data set, or all image files in and below FOLDER.
Images of a folder are cropped and resized to the size of the network.
"""
EPILOG = """\
columns: features; projections; for a folder path; for a data set index, split, label (-1: none), class, and
path if its images are files
  .npz       one array per column: np.load("features.npz")["features"]
  .csv       features_0, features_1, ...
  .parquet   lists of float32; needs pyarrow
"""
INSTEAD = "leave it out; the device is set with --device, and features are computed in float32"


def parser() -> arguments.Parser:
    """Return the parser of the command line."""
    parser = arguments.Parser(prog="ssl-embed", description=DESCRIPTION, epilog=EPILOG)
    run = "folder of a finished run; with FOLDER also a backbone.safetensors"
    parser.add_argument("run", metavar="RUN", type=Path, help=run)
    source = "FOLDER, or dataset=<name> and dataset.<option>=<value>"
    parser.add_argument("source", metavar="SOURCE", nargs="*", default=[], help=source)
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write: .npz, .csv or .parquet")
    parser.add_argument("--projections", action="store_true", help="also write the projector's output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<number> or mps")
    parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass (256)")
    parser.add_argument("--skip-errors", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--config-dir", help="folder with configs of your own (default: that of the run)")
    return parser


def main() -> None:
    """Entry point of `ssl-embed`. Exit codes: 0, 1 after an error, 130 after Ctrl-C."""
    console.call(execute)


def folder_in(source: list[str]) -> Path | None:
    """Return FOLDER, None for settings of a data set. Raises UsageError for both, or if it is no folder."""
    folders = [word for word in source if Path(word).is_dir() or not re.match(r"[+~]?\w[\w.@/]*=", word)]
    if folders and len(source) > 1:
        raise UsageError(f"{' '.join(source)}: expected one FOLDER, or dataset=<name>; give one of them")
    if folders and not Path(folders[0]).is_dir():
        raise UsageError(f"{folders[0]}: expected a folder of images, or dataset=<name>; give one of them")
    return Path(folders[0]) if folders else None


def execute() -> None:
    """Validate the command line, then write the features."""
    args = parser().read()
    if args.batch_size < 1:
        raise UsageError(f"--batch-size={args.batch_size}: expected an integer >= 1")
    folder = folder_in(args.source)
    check_device("--device", args.device)

    from ssl_runner import numerics
    from ssl_runner.device import choose_device, keep_freed_memory
    from ssl_runner.evaluation import embed
    from ssl_runner.evaluation.finished import config_of, finished_record, read_data, warn_other_images
    from ssl_runner.evaluation.tables import check_target
    from ssl_runner.pretrained import load

    check_target(args.out, args.overwrite)
    device = choose_device(args.device)
    numerics.apply(device, "fp32", deterministic=False)
    keep_freed_memory(device)
    if folder is not None:
        if (args.run / "run.json").is_file():
            finished_record(args.run)
        images = embed.Folder(folder, args.skip_errors)
        network, transform = load(args.run, device, with_projector=args.projections)
        batches, total = images.batches(transform, args.batch_size, device), len(images)
    else:
        cfg = config_of(args.run, args.source, args.config_dir, ("dataset",), INSTEAD)
        network, transform = load(args.run, device, with_projector=args.projections)
        data = read_data(cfg, transform, device)
        warn_other_images(args.run, cfg, data)
        batches = embed.data_set_batches(data, args.batch_size)
        total = sum(map(len, embed.splits(data).values()))
    skipped = images.skipped if folder is not None else data.skipped
    rows = embed.embed_to_file(network, batches, total, args.projections, args.out, args.overwrite)
    if str(skipped):
        print(f"{skipped} ({', '.join(skipped.names)})", file=sys.stderr)
    width: Any = network.backbone.width
    print(f"{counted(rows, 'image')}, {counted(width, 'feature')} each: {args.out}", flush=True)
