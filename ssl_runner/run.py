"""One run, from its configuration to its files; reads top to bottom as the way of the data."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ssl_runner import checkpoint, closed_form, dataset, distributed, linear, memory, optimizer, replica
from ssl_runner.backbone import Backbone, LinearBackbone, evaluating
from ssl_runner.closed_form import ClosedForm, MomentsGap
from ssl_runner.config import check_values, identity, one_line, shown
from ssl_runner.dataset import DataSet
from ssl_runner.diagnostics import COLUMNS, Diagnostics
from ssl_runner.errors import Refused
from ssl_runner.loss import Loss
from ssl_runner.metrics import Table
from ssl_runner.preemption import Preemption
from ssl_runner.probe import discriminants, principal_components, probe
from ssl_runner.record import Record
from ssl_runner.relate import BatchRelation
from ssl_runner.train import Pretraining, choose_device, choose_precision
from ssl_runner.views import Augment, preview

DATASET_OPTIONS = ("name", "val", "subset", "split_seed", "location")
OPTIMIZER_OPTIONS = ("lr", "weight_decay", "warmup_epochs", "final_lr", "clip")


@dataclass
class Prepared:
    """All that a run is made of, built and checked, before its first step. Who uses the relation takes a copy, so that what one
    draws or queues is not another's."""

    device: torch.device
    precision: str
    data: DataSet
    augment: Augment
    relation: BatchRelation
    fresh_backbone: Callable[[], Backbone]
    backbone: Backbone
    projector: nn.Module
    K: int
    loss: Loss
    optimizer: Optimizer


def prepare(cfg: DictConfig, data: DataSet | None = None, weights: bool = True) -> Prepared:
    """Builds every stage from its settings; `data` spares reading it again, and without `weights` a run that has a checkpoint of
    its own needs none to start from. Raises Refused for what cannot run."""
    check_values(cfg)
    device = choose_device(cfg.device)
    if device.type == "cpu":
        memory.keep_freed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = choose_precision(cfg.precision, device)
    if cfg.solver.name == "closed_form":
        if cfg.precision not in ("auto", "fp32"):
            raise Refused(
                f"precision={cfg.precision}: solver=closed_form computes in fp32 and fp64; give auto or fp32"
            )
        precision = "fp32"
    loss = build("loss", cfg.loss).to(device)
    relation = build("relation", cfg.relation)
    check_linear(cfg, loss, relation)
    augment = build("views", cfg.views, without=("preview", "sizes"))
    algorithm = build("optimizer", cfg.optimizer, without=OPTIMIZER_OPTIONS, partial=True)
    if data is None:
        source = build("dataset", cfg.dataset, without=DATASET_OPTIONS, partial=True)
        with distributed.in_turn():
            data = dataset.load(
                source, device=device, **{option: cfg.dataset[option] for option in DATASET_OPTIONS}
            )
    check_fit(cfg, data, relation)

    def fresh_backbone() -> Backbone:
        torch.manual_seed(cfg.seed)
        backbone = build("backbone", cfg.backbone, channels=data.channels, image_size=data.image_size)
        return backbone.to(
            device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format
        )

    backbone = replica.synchronized(fresh_backbone())
    if cfg.weights is not None and weights:
        checkpoint.restore(backbone, Path(cfg.weights).expanduser())
    if cfg.solver.name == "closed_form" and isinstance(backbone, LinearBackbone):
        projector: nn.Module = nn.Identity()  # the backbone itself is the matrix to be found
    else:
        projector = replica.synchronized(
            build("projector", cfg.projector, features=backbone.width).to(device)
        )
    if cfg.solver.name == "closed_form":
        closed_form.parts(backbone, projector)
    if cfg.diagnostics.moments and (not isinstance(backbone, LinearBackbone) or count(projector)):
        raise Refused(
            "diagnostics.moments is for a linear model: use backbone=linear projector=identity, or set it to 0"
        )
    check_sizes(cfg, backbone, data)
    check_blur(cfg, augment, data)
    modules = [backbone, projector, loss]
    return Prepared(
        device=device,
        precision=precision,
        data=data,
        augment=augment,
        relation=relation,
        fresh_backbone=fresh_backbone,
        backbone=backbone,
        projector=projector,
        K=width_of(projector, backbone.width),
        loss=loss,
        optimizer=optimizer.build(modules, algorithm, cfg.optimizer.lr, cfg.optimizer.weight_decay),
    )


def check_jobs(jobs: Iterable[tuple[str, DictConfig]]) -> None:
    """Prepares every job of a sweep, reading each data set once. Raises Refused for the first that cannot run."""
    read: dict[str, DataSet] = {}
    for overrides, cfg in jobs:
        key = OmegaConf.to_yaml(cfg.dataset, resolve=True) + cfg.device
        try:
            read[key] = prepare(cfg, read.get(key)).data
        except Refused as error:
            raise Refused(f"{error} (in the sweep's job {overrides})") from error


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Pretrains, probes and writes metrics.csv, probe.csv, spectrum.csv, run.json, checkpoint.pt and backbone.safetensors into
    `folder`, or goes on in it from the checkpoint that is there. Returns the last `loss`, and the first probe's top-1 on the test
    split (`top1`) and on the validation split (`val_top1`). Raises Refused for what cannot run, Preempted when a signal asks the
    run to end; whatever is raised also stands in run.json. Several processes call it alike, and the first one writes.
    """
    record, leads = Record(folder, identity(cfg)), distributed.leads()
    with Preemption() as preemption, record, distributed.together(record.lost):
        begun = distributed.share(checkpoint.newest(folder) if leads else None)
        stages = prepare(cfg, weights=begun is None)
        data, backbone, projector = stages.data, stages.backbone, stages.projector
        metrics, probes = (Table(folder / name if leads else None) for name in ("metrics.csv", "probe.csv"))
        solver = build_solver(
            cfg, stages, preemption, partial(checkpoint.save, folder=folder) if leads else lambda state: None
        )
        if begun is not None:
            solver.load_state_dict(checkpoint.load(begun))
        metrics.keep(solver.epoch)
        probes.keep(solver.epoch)
        if (
            cfg.compile
        ):  # what is trained, whose shapes stay; probes and diagnostics run the same modules as they are
            (solver.network if isinstance(solver, Pretraining) else backbone).compile(dynamic=False)
        record.note(
            device=torch.cuda.get_device_name(stages.device)
            if stages.device.type == "cuda"
            else str(stages.device),
            precision=stages.precision,
            relation={
                "target": cfg.relation._target_,
                "normalized": cfg.relation.get("normalized", False),
                "pairs": stages.relation.listed(data.pretrain.rows),
            },
            images={split: len(getattr(data, split)) for split in ("pretrain", "train", "val", "test")},
            classes=data.classes,
            parameters={"backbone": count(backbone), "projector": count(projector)},
        )
        if leads:
            print(headline(cfg, record), flush=True)
        if leads and cfg.views.preview:
            preview(stages.augment, data, cfg.V, cfg.seed, folder / "views.png")

        diagnostics = build_diagnostics(cfg, stages) if cfg.diagnostics.every else None
        gap = build_moments_gap(cfg, stages) if cfg.diagnostics.moments else None
        for row in solver.epochs():
            last = solver.epoch == solver.total_epochs
            if diagnostics and (last or solver.epoch % cfg.diagnostics.every == 0):
                row = row | diagnostics(backbone, projector)
            elif diagnostics:
                row = row | dict.fromkeys(COLUMNS)
            if gap:
                row = row | gap(closed_form.parts(backbone, projector)[1])
            metrics.append(row)
            if cfg.probe.every and solver.epoch % cfg.probe.every == 0 and not last:
                for scored in probe("backbone", backbone, data, cfg.probe.probes, score_test=False):
                    probes.append({"epoch": solver.epoch, **scored})
        if diagnostics:
            lines = diagnostics.spectrum(backbone, projector)
            if leads:
                (folder / "spectrum.csv").unlink(missing_ok=True)
            for line in lines:
                Table(folder / "spectrum.csv" if leads else None).append(line)
        if leads:
            export(cfg, data, backbone, folder / "backbone.safetensors")

        networks = {
            "backbone": lambda: backbone,
            "projector": lambda: nn.Sequential(backbone, projector),
            "random_init": stages.fresh_backbone,
            "pixels": nn.Flatten,
            "pca": lambda: principal_components(data, stages.K),
            "lda": lambda: discriminants(data),
        }
        # the features whose accuracy is the run's
        trained = "projector" if cfg.solver.name == "closed_form" and count(projector) else "backbone"
        scores: dict[tuple[str, str, str], float] = {}
        for features in tqdm(
            dict.fromkeys([trained, *cfg.probe.features]), "probe", disable=None if leads else True
        ):
            for scored in probe(features, networks[features](), data, cfg.probe.probes, score_test=True):
                probes.append({"epoch": solver.epoch, **scored})
                scores[features, scored["probe"], scored["eval_split"]] = scored["top1"]
        if leads:
            print(table(scores), flush=True)
        result = {
            "loss": solver.last_row["loss"],
            "top1": scores[trained, cfg.probe.probes[0], "test"],
            "val_top1": scores[trained, cfg.probe.probes[0], "val"],
        }
        record.note(**result)
    return result


def build_solver(
    cfg: DictConfig, stages: Prepared, preemption: Preemption, save: Callable[[dict[str, Any]], None]
) -> Pretraining | ClosedForm:
    """What finds the weights; it calls `save` with its state where it may go on from, and heeds `preemption`."""
    data, backbone, projector = stages.data, stages.backbone, stages.projector
    if cfg.solver.name == "closed_form":
        return ClosedForm(
            backbone,
            projector,
            stages.loss,
            data,
            stages.augment,
            deepcopy(stages.relation),
            V=cfg.V,
            batch_size=cfg.batch_size,
            passes=cfg.solver.passes,
            ridge=cfg.solver.ridge,
            seed=cfg.seed,
            save=save,
        )
    steps_per_epoch = len(data.pretrain) // cfg.batch_size
    return Pretraining(
        backbone,
        projector,
        stages.loss,
        stages.optimizer,
        partial(
            optimizer.cosine,
            steps=cfg.epochs * steps_per_epoch,
            warmup=round(cfg.optimizer.warmup_epochs * steps_per_epoch),
            lr=cfg.optimizer.lr,
            final=cfg.optimizer.final_lr,
        ),
        data,
        stages.augment,
        deepcopy(stages.relation),
        V=cfg.V,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        clip=cfg.optimizer.clip,
        precision=stages.precision,
        channels_last=cfg.channels_last,
        separate=cfg.views_forward == "separate",
        seed=cfg.seed,
        sizes=cfg.views.sizes or (None,),
        preemption=preemption,
        save=save,
    )


def build_diagnostics(cfg: DictConfig, stages: Prepared) -> Diagnostics:
    """Diagnostics, whose neighbours, if the relation has any, are sought within the subset."""
    return Diagnostics(
        stages.data,
        stages.augment,
        stages.relation.repeatable(),
        stages.loss,
        V=cfg.V,
        images=cfg.diagnostics.images,
        seed=cfg.seed,
        fixed=not stages.relation.depends_on_embeddings,
    )


def build_moments_gap(cfg: DictConfig, stages: Prepared) -> MomentsGap:
    """The linear model's distance from the closed form."""
    with distributed.alone():
        moments = closed_form.stream(
            nn.Flatten(),
            closed_form.parts(stages.backbone, stages.projector)[1].in_features,
            stages.data,
            stages.augment,
            deepcopy(stages.relation),
            V=cfg.V,
            batch_size=cfg.batch_size,
            passes=cfg.diagnostics.moments,
            seed=cfg.seed,
        )
    return MomentsGap(moments.centred(), stages.loss, stages.K)


def build(
    key: str, node: DictConfig, *, without: Sequence[str] = (), partial: bool = False, **extra: Any
) -> Any:
    """What a node's `_target_` makes of its settings, but for those in `without`. Refused when the target does not take them."""
    settings = {name: value for name, value in node.items() if name not in without}
    try:
        return instantiate(settings, **extra, _partial_=partial, _convert_="all")
    except InstantiationException as error:
        raise Refused(f"{key}: {one_line(error.__cause__ or error)}") from error


def check_linear(cfg: DictConfig, loss: Loss, relation: BatchRelation) -> None:
    """Refuses a loss or a relation for which what is asked of the linear model has no closed form."""
    closed_form = cfg.solver.name == "closed_form"
    asked = "solver=closed_form" if closed_form else f"diagnostics.moments={cfg.diagnostics.moments}"
    if not closed_form and not cfg.diagnostics.moments:
        return
    if not linear.solvable(loss):
        raise Refused(
            f"{asked}: {type(loss).__name__} has no closed linear form; vicreg, simclr, simclr_squared and barlow have"
        )
    if relation.reaches_beyond:
        raise Refused(f"{asked} relates rows of one batch: set relation.queue=0")


def check_sizes(cfg: DictConfig, backbone: Backbone, data: DataSet) -> None:
    """Refuses sizes of views that the backbone does not take, or that a run without training would ignore."""
    if cfg.views.sizes is None:
        return
    if cfg.solver.name == "closed_form":
        raise Refused("views.sizes is for training: leave it out with solver=closed_form")
    for size in dict.fromkeys(cfg.views.sizes):
        try:
            with torch.no_grad(), evaluating(backbone):
                backbone(torch.zeros(1, data.channels, size, size, device=data.mean.device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise Refused(
                f"views.sizes={shown(cfg.views.sizes)}: this backbone takes no {size} x {size} pixels"
            ) from error


def check_blur(cfg: DictConfig, augment: Augment, data: DataSet) -> None:
    """Refuses a blur that reaches over the views."""
    own = data.image_size
    policies = augment.policies if isinstance(augment, Augment) else []  # a user's views may have none
    for policy, size in product(policies, cfg.views.sizes or [own]):
        try:
            policy.kernel((own, own), (size, size))
        except ValueError as error:
            raise Refused(f"views: {error}") from error


def check_fit(cfg: DictConfig, data: DataSet, relation: BatchRelation) -> None:
    """Binds the relation to the data set. Refuses a batch that is larger than that or too small for the relation, and a relation
    that the data set does not allow."""
    if cfg.batch_size > len(data.pretrain):
        raise Refused(
            f"batch_size={cfg.batch_size}: {data.name} has {len(data.pretrain)} images to pretrain on; give at most as many"
        )
    if cfg.batch_size % distributed.size():
        W = distributed.size()
        raise Refused(
            f"batch_size={cfg.batch_size} is shared by {W} processes: give a multiple of {W}, or start another number"
        )
    if cfg.batch_size < relation.fewest:
        raise Refused(
            f"batch_size={cfg.batch_size}: relation={cfg.relation._target_} seeks neighbours within the batch and needs"
            f" {relation.fewest} originals in it; give at least as many, or a smaller relation.k"
        )
    relation.bind(data.pretrain.labels.cpu())
    if relation.needs_labels and bool((data.pretrain.y < 0).any()):
        raise Refused(
            f"relation={cfg.relation._target_} needs a label for every image, and {data.name} has unlabelled ones; use views"
        )
    if relation.listed(data.pretrain.rows) == 0:
        raise Refused(
            f"relation.path={cfg.relation.path}: no pair is of two of the {len(data.pretrain)} images to pretrain on;"
            " number the rows as conf/relation/edges.yaml says, where those of test and validation images do not count"
        )


def width_of(projector: nn.Module, features: int) -> int:
    """The number of columns of Z: what the projector makes of some features."""
    weight = next(projector.parameters(), None)
    if weight is None:
        return features
    training = projector.training
    with torch.no_grad():
        width = projector.eval()(torch.zeros(1, features, device=weight.device)).shape[1]
    projector.train(training)
    return width


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def headline(cfg: DictConfig, record: Record) -> str:
    """One line that says what is about to run."""
    facts = record.content
    relation = facts["relation"]["target"].split(".")[-1] + (
        " (normalized)" if facts["relation"]["normalized"] else ""
    )
    images = " ".join(f"{split}={n}" for split, n in facts["images"].items())
    parameters = " ".join(f"{module}={n:,}" for module, n in facts["parameters"].items())
    where = f"{facts['processes']} x " if facts["processes"] > 1 else ""
    where += f"{facts['device']} {facts['precision']}"
    return f"{cfg.dataset.name} {images} | V={cfg.V} G={relation} | {parameters} parameters | {where}"


def table(scores: dict[tuple[str, str, str], float]) -> str:
    """Top-1 on the test split as lines: a row for the features, a column for the probe."""
    probes = list(dict.fromkeys(probe for _, probe, _ in scores))
    lines = [f"{'test top-1':<12}" + "".join(f"{probe:>9}" for probe in probes)]
    for features in dict.fromkeys(features for features, _, _ in scores):
        lines.append(
            f"{features:<12}" + "".join(f"{scores[features, probe, 'test']:>9.4f}" for probe in probes)
        )
    return "\n".join(lines)


def export(cfg: DictConfig, data: DataSet, backbone: nn.Module, path: Path) -> None:
    """Writes the backbone with what is needed to rebuild it and to feed it."""
    checkpoint.export(
        backbone,
        path,
        {
            "backbone": OmegaConf.to_container(cfg.backbone),
            "channels": data.channels,
            "image_size": data.image_size,
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
        },
    )
