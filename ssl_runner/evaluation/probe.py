"""Probe a finished run again, on its own or another data set, and append the rows to its probe.csv."""

import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ssl_runner import build, numerics
from ssl_runner.data.dataset import DataSet
from ssl_runner.device import choose_device, choose_precision, keep_freed_memory
from ssl_runner.errors import UsageError
from ssl_runner.evaluation.finished import read_data, warn_other_images
from ssl_runner.model import SSLModel
from ssl_runner.pretrained import load
from ssl_runner.probe import (
    FineTuning,
    LabelDraw,
    affordable,
    check_layer,
    evaluate_seeded,
    feature_networks,
    finetune,
    label_draws,
    layer_names,
)
from ssl_runner.progress import progress
from ssl_runner.runs import resume
from ssl_runner.runs.files import CsvLog
from ssl_runner.runs.run_json import read_record


def probe(folder: Path, cfg: DictConfig) -> str:
    """Probe the exported network of the run in `folder` as `cfg` says. Returns a table of the results.

    The rows are appended to probe.csv, with the epoch of the exported weights, and the time in the column
    `probing`, which is empty in the rows of the run itself. With `probe.labels` only the shares of the labels
    are probed. Raises UsageError if the data set has no labels, or other images than the network takes.
    """
    device = choose_device(cfg.device)
    switches = numerics.apply(device, cfg.precision, cfg.deterministic)
    precision = choose_precision(cfg.precision, device)
    keep_freed_memory(device)
    with resume.lock_folder(folder):
        network, transform = load(folder, device, with_projector="projector" in cfg.probe.features)
        backbone: Any = network.backbone
        model = SSLModel(backbone, network.projector or nn.Identity(), cfg.channels_last)
        model.to(memory_format=model.memory_format)
        data = read_data(cfg, transform, device)
        warn_other_images(folder, cfg, data)
        if not data.classes:
            raise UsageError(f"dataset={data.name}: expected images with labels, found none; use another one")
        chosen, large = affordable(cfg.probe.features, data)
        lines = [headline(folder, data, device), str(data.skipped), large]
        print(*filter(None, lines), sep="\n", flush=True)
        log, rows = CsvLog(folder / "probe.csv"), []
        log.truncate_after(math.inf)  # an incomplete last line
        last = int(pd.read_csv(folder / "metrics.csv").epoch.iloc[-1])
        epoch = read_record(folder / "run.json").get("exported_epoch", last)
        probing = datetime.now().isoformat(timespec="milliseconds")
        for row in probe_rows(cfg, chosen, model, data, precision, switches):
            log.append({"epoch": epoch, **row, "probing": probing})
            rows.append(row)
    return format_results(rows)


def probe_rows(
    cfg: DictConfig,
    features: Sequence[str],
    model: SSLModel,
    data: DataSet,
    precision: str,
    switches: dict[str, bool],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of all probes that `cfg.probe` names, of these features.

    `switches` are those that `numerics.apply` returned.
    """
    device = data.mean.device
    if cfg.probe.layer is not None:
        check_layer(
            model.backbone, cfg.probe.layer, (data.channels, data.image_size, data.image_size), device
        )
    shares = label_draws(data.train.y, cfg.probe.labels, cfg.probe.draws, cfg.dataset.split_seed)
    draws: list[LabelDraw | None] = [*shares] or [None]
    frozen = [name for name in cfg.probe.probes if name != "finetune"]
    networks = feature_networks(
        data, model, partial(build.build_backbone, cfg, data, device), cfg.probe.layer
    )
    classifiers = build.build_classifiers(cfg, frozen)
    settings: Any = OmegaConf.to_container(cfg.probe.finetune) if "finetune" in cfg.probe.probes else None
    tuning = None if settings is None else FineTuning(**settings)  # checked before the first row
    cache = build.baseline_cache(cfg, data, draws, switches, model.K)
    for name in progress([*features, *layer_names(cfg.probe.layer)] if frozen else [], "probe"):
        seed = cfg.dataset.split_seed
        compute = partial(evaluate_seeded, name, networks[name], data, classifiers, draws, seed)
        yield from cache.rows(name, compute)
    if tuning is not None:
        yield from finetune(model, data, tuning, draws, precision, cfg.seed)


def headline(folder: Path, data: DataSet, device: torch.device) -> str:
    """One line: data set and splits, run, device."""
    images = " ".join(f"{split}={n}" for split, n in data.counts.items() if split != "pretrain")
    return f"{data.name} {images} | network of {folder} | {device}"


def format_results(rows: list[dict[str, Any]]) -> str:
    """Top-1 of every probe and split, one line per probe: the mean and standard deviation over draws."""
    results: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        key = (row["features"], row["probe"], f"{row['label_share']:g}" if "label_share" in row else "all")
        results.setdefault(key, {}).setdefault(row["eval_split"], []).append(row["top1"])
    lines = [("features", "probe", "labels", "val top-1", "test top-1")]
    for key, scores in results.items():
        lines.append((*key, mean_and_spread(scores.get("val", [])), mean_and_spread(scores.get("test", []))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)


def mean_and_spread(values: list[float]) -> str:
    """`0.9660`, with ` ± ` and the standard deviation if there are several values, `-` without values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
