"""One run, from its configuration to its files: the stages, top to bottom."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from ssl_runner import __version__, distributed
from ssl_runner.build import Experiment, build
from ssl_runner.config.rules import run_id
from ssl_runner.data.loader import preview
from ssl_runner.model import count_parameters
from ssl_runner.preemption import Preemption
from ssl_runner.probe import evaluate, linear_discriminants, principal_components
from ssl_runner.runs import checkpoint, weights
from ssl_runner.runs.files import CsvLog
from ssl_runner.runs.record import RunRecord


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Pretrain, probe, and write the files of the run to `folder`.

    These are metrics.csv, probe.csv, spectrum.csv, run.json, checkpoint.pt, backbone.safetensors and
    projector.safetensors. Resumes from the checkpoint in `folder` if there is one. Every rank calls this; the
    main process writes.

    Returns the last `loss` and the first probe's top-1 on the test split (`top1`) and on the validation split
    (`val_top1`). Raises UsageError for a run that cannot work and Preempted after a signal; run.json records
    every exception.
    """
    record, is_main = RunRecord(folder, run_id(cfg)), distributed.is_main_process()
    with Preemption() as preemption, record, distributed.propagate_failures(record.fail):
        resume_from = distributed.broadcast_object(checkpoint.find(folder) if is_main else None)
        experiment = build(cfg, init_weights=resume_from is None)
        metrics, probes = (
            CsvLog(folder / f"{name}.csv" if is_main else None) for name in ("metrics", "probe")
        )
        save = partial(checkpoint.save, folder=folder) if is_main else lambda state: None
        solver, model = experiment.solver(preemption, save), experiment.model
        evaluators = experiment.evaluators(folder, probes)
        if resume_from is not None:  # last, since it restores the random states
            solver.load_state_dict(checkpoint.load(resume_from))
        metrics.truncate_after(solver.epoch)
        probes.truncate_after(solver.epoch)
        if experiment.initial_weights is not None and is_main:
            print(experiment.initial_weights, flush=True)
        if cfg.compile:
            solver.compile()
        record.update(**facts(experiment))
        if is_main:
            print(headline(cfg, record), flush=True)
        if is_main and cfg.views.preview:
            preview(experiment.loader, folder / "views.png")

        for row in solver.epochs():
            for evaluator in evaluators:
                row = merge(row, evaluator(model, solver.epoch, last=solver.epoch == solver.total_epochs))
            metrics.append(row)
        for evaluator in evaluators:
            evaluator.finish(model)
        if is_main:
            weights.export(model.backbone, folder / weights.BACKBONE, description(experiment))
            weights.export(model.projector, folder / weights.PROJECTOR, description(experiment))

        # top-1 by features, probe and split; the test split is scored once, here
        scores: dict[tuple[str, str, str], float] = {}
        extractors = feature_extractors(experiment)
        chosen = dict.fromkeys([solver.result_features, *cfg.probe.features])
        for features in tqdm(chosen, "probe", disable=None if is_main else True):
            network = extractors[features]()
            for row in evaluate(features, network, experiment.data, experiment.classifiers, score_test=True):
                probes.append({"epoch": solver.epoch, **row})
                scores[features, row["probe"], row["eval_split"]] = row["top1"]
        if is_main:
            print(format_table(scores), flush=True)
        test, val = (scores[solver.result_features, cfg.probe.probes[0], split] for split in ("test", "val"))
        result = {"loss": solver.last_row["loss"], "top1": test, "val_top1": val}
        record.update(**result)
    return result


def merge(row: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Add an evaluator's columns to a row of metrics.csv. Raises ValueError for a name that is taken."""
    if taken := row.keys() & columns.keys():
        raise ValueError(
            f"evaluators: metrics.csv already has {', '.join(sorted(taken))}; rename the columns"
        )
    return row | columns


def feature_extractors(experiment: Experiment) -> dict[str, Callable[[], nn.Module]]:
    """The networks to probe, by the names of `probe.features`, built on demand."""
    data, model = experiment.data, experiment.model
    return {
        "backbone": lambda: model.backbone,
        "projector": lambda: nn.Sequential(model.backbone, model.projector),  # model may be compiled
        "random_init": experiment.fresh_backbone,
        "pixels": nn.Flatten,
        "pca": lambda: principal_components(data, model.K),
        "lda": lambda: linear_discriminants(data),
    }


def facts(experiment: Experiment) -> dict[str, object]:
    """Fields of run.json that describe the parts of the run."""
    cfg, device, data = experiment.cfg, experiment.device, experiment.data
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": experiment.precision,
        "relation": {
            "target": cfg.relation._target_,
            "normalized": cfg.relation.get("normalized", False),
            "pairs": experiment.relation.count_pairs(data.pretrain.indices),
        },
        "images": {split: len(getattr(data, split)) for split in ("pretrain", "train", "val", "test")},
        "classes": data.classes,
        "parameters": {
            name: count_parameters(getattr(experiment.model, name)) for name in ("backbone", "projector")
        },
    }


def description(experiment: Experiment) -> dict[str, object]:
    """Metadata of the exported weights: how to rebuild the networks and how to preprocess their input.

    `projector` is None if the embeddings are the features.
    """
    cfg, data, model = experiment.cfg, experiment.data, experiment.model
    identity = isinstance(model.projector, nn.Identity)
    return {
        "version": __version__,
        "backbone": OmegaConf.to_container(cfg.backbone, resolve=True),
        "width": model.backbone.width,
        "projector": None if identity else OmegaConf.to_container(cfg.projector, resolve=True),
        "K": model.K,
        "channels": data.channels,
        "image_size": data.image_size,
        "resize": "centre crop to a square, bicubic",
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
    }


def headline(cfg: DictConfig, record: RunRecord) -> str:
    """One line: data set and splits, views and positives, parameters, device and precision."""
    content = record.content
    images = " ".join(f"{split}={n}" for split, n in content["images"].items())
    positives = content["relation"]["target"].split(".")[-1].removeprefix("From").lower()
    positives += " (normalized)" if content["relation"]["normalized"] else ""
    parameters = " ".join(f"{module}={n:,}" for module, n in content["parameters"].items())
    processes = f"{content['processes']} x " if content["processes"] > 1 else ""
    where = f"{processes}{content['device']} {content['precision']}"
    return (
        f"{cfg.dataset.name} {images} | V={cfg.V} positives: {positives} | {parameters} parameters | {where}"
    )


def format_table(scores: dict[tuple[str, str, str], float]) -> str:
    """Top-1 on the test split as lines of text: one row per kind of features, one column per probe."""
    probes = list(dict.fromkeys(probe for _, probe, _ in scores))
    lines = [f"{'test top-1':<12}" + "".join(f"{probe:>9}" for probe in probes)]
    for features in dict.fromkeys(features for features, _, _ in scores):
        lines.append(
            f"{features:<12}" + "".join(f"{scores[features, probe, 'test']:>9.4f}" for probe in probes)
        )
    return "\n".join(lines)
