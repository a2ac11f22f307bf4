"""What a run says about itself: facts in run.json, metadata of the exported weights, and lines on stdout."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ssl_runner import __version__, distributed
from ssl_runner.build import Experiment
from ssl_runner.data.dataset import DataSet
from ssl_runner.errors import counted
from ssl_runner.model import count_parameters
from ssl_runner.probe import affordable
from ssl_runner.runs.record import RunRecord
from ssl_runner.theory.gamma import expected_relation, gamma_limits
from ssl_runner.views.augment import numba_works


def facts(experiment: Experiment) -> dict[str, object]:
    """Fields of run.json that describe the parts of the run."""
    cfg, device, data = experiment.cfg, experiment.device, experiment.data
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": experiment.precision,
        "numerics": experiment.numerics,
        "view_kernels": "numba" if device.type == "cpu" and numba_works() else "torch",
        "relation": {
            "target": cfg.relation._target_,
            "normalized": cfg.relation.get("normalized", False),
            "pairs": experiment.relation.count_pairs(data.pretrain.indices),
        },
        "gamma_limits": limits_of(experiment),
        "images": data.counts,
        "data_digest": data.digest,
        "classes": data.classes,
        "layout": data.layout,
        "skipped": data.skipped.record(),
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
        "stored_size": data.stored_size,
        "tensor_resize": data.tensor_resize,
        "eval_resize": data.transform.resize if data.transform else None,
        "eval_crop": data.transform.crop if data.transform else None,
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
    }


def headline(cfg: DictConfig, record: RunRecord) -> str:
    """One line: data set and splits, views and positives, parameters, device and precision."""
    content = record.content
    images = " ".join(f"{split}={n}" for split, n in content["images"].items())
    classes = f", {counted(len(content['classes']), 'class', 'classes')}" if content["classes"] else ""
    layout = f" ({content['layout']}{classes})" if content["layout"] else ""
    positives = content["relation"]["target"].split(".")[-1].removeprefix("From").lower()
    positives += " (normalized)" if content["relation"]["normalized"] else ""
    parameters = " ".join(f"{module}={n:,}" for module, n in content["parameters"].items())
    processes = f"{content['processes']} x " if content["processes"] > 1 else ""
    where = f"{processes}{content['device']} {content['precision']}"
    return (
        f"{cfg.dataset.name}{layout} {images} | V={cfg.V} positives: {positives} | {parameters} parameters"
        f" | {where}"
    )


def notes(data: DataSet, features: Sequence[str]) -> list[str]:
    """Lines after the headline: the skipped files, and probes that are left out."""
    lines = [str(data.skipped)] if str(data.skipped) else []
    if not data.classes:
        return [*lines, "probes are off: the images have no labels"]
    _, large = affordable(features, data)
    if large:
        lines.append(large)
    if not len(data.test):
        lines.append("no test images: the result is the top-1 on the validation split, which also selects")
    return lines


def limits_of(experiment: Experiment) -> dict[str, float | None] | None:
    """`gamma_limits` on the relation of a batch, None if unknown or without gradient steps."""
    if not experiment.solver_class.trains:
        return None
    cfg, labels = experiment.cfg, experiment.data.pretrain.y
    with distributed.local_only():  # every rank computes it for the rows of all ranks
        G = expected_relation(experiment.relation, cfg.V, cfg.batch_size, labels)
        return gamma_limits(experiment.loss, G, experiment.model.K)


def format_table(scores: dict[tuple[str, str, str], float], split: str) -> str:
    """Top-1 on a split as lines of text: one row per kind of features, one column per probe."""
    probes = list(dict.fromkeys(probe for _, probe, _ in scores))
    width = max(12, *(len(features) + 1 for features, _, _ in scores))
    lines = [f"{f'{split} top-1':<{width}}" + "".join(f"{probe:>9}" for probe in probes)]
    for features in dict.fromkeys(features for features, _, _ in scores):
        lines.append(
            f"{features:<{width}}" + "".join(f"{scores[features, probe, split]:>9.4f}" for probe in probes)
        )
    return "\n".join(lines)
