"""cfg -> Experiment: build every part of a run, and check what needs data or libraries, before training."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from ssl_runner import distributed, numerics, optimizer
from ssl_runner.backbone import Backbone, LinearBackbone
from ssl_runner.checks import check_arguments, check_fit, check_parts
from ssl_runner.config.paths import escape
from ssl_runner.config.rules import check_values
from ssl_runner.config.training import check_training
from ssl_runner.data import dataset
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.device import choose_device, choose_precision, keep_freed_memory
from ssl_runner.errors import UsageError, of_part
from ssl_runner.evaluator import Evaluator, check_columns
from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel
from ssl_runner.names import EVALUATION
from ssl_runner.preemption import Preemption
from ssl_runner.probe import BaselineCache, BestEpoch, Classifier, LabelDraw, ProbeEvaluator
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.runs import weights
from ssl_runner.runs.files import CsvLog
from ssl_runner.runs.schedule import Schedule
from ssl_runner.solver import Save, Solver

# options of `dataset.load`, not of the reader
DATASET_SETTINGS = ("name", "val_fraction", "test_fraction", "subset", "split_seed", "storage")
OPTIMIZER_SETTINGS = ("lr", "weight_decay", "warmup_epochs", "final_lr_ratio", "clip_grad_norm")


@dataclass
class Experiment:
    """The parts of a run, built and checked.

    `relation` is bound to the data. Its state belongs to the solver, which gets a copy.
    """

    cfg: DictConfig
    device: torch.device
    precision: str
    numerics: dict[str, bool]  # switches of torch's arithmetic, as set for this run
    data: DataSet
    loader: MultiViewLoader
    relation: RelationBuilder
    loss: Loss
    model: SSLModel
    optimizer: Optimizer | None  # None for a solver that takes no gradient steps
    solver_class: type[Solver]
    classifiers: dict[str, Classifier]  # in the order of probe.probes
    fresh_backbone: Callable[[], Backbone]  # with the initial weights of the run's seed
    initial_weights: str | None  # line that states what `init_weights` loaded
    logger: Any  # of the group `logger`, None for logger=none

    def solver(
        self,
        preemption: Preemption,
        save: Callable[[dict[str, Any], Save], None],
        schedule: Schedule | None = None,
    ) -> Solver:
        """The solver. It calls `save` with its state wherever it can resume from.

        `schedule` has several parts for a run that was extended.
        """
        cfg = self.cfg
        parts: dict[str, Any] = {"model": self.model, "loss": self.loss, "loader": self.loader, "save": save}
        if self.solver_class.trains:
            learning_rate = partial(
                optimizer.learning_rate,
                schedule=schedule or [{"from_epoch": 0, "to_epoch": cfg.epochs}],
                steps_per_epoch=self.loader.steps_per_epoch,
                warmup_epochs=cfg.optimizer.warmup_epochs,
                lr=cfg.optimizer.lr,
                final_ratio=cfg.optimizer.final_lr_ratio,
            )
            parts |= {
                "optimizer": self.optimizer,
                "learning_rate": learning_rate,
                "precision": self.precision,
                "clip_grad_norm": cfg.optimizer.clip_grad_norm,
                "per_view": cfg.forward == "per_view",
                "preemption": preemption,
            }
        return build_node("solver", cfg.solver, relation=deepcopy(self.relation), **parts)

    def evaluators(self, folder: Path, probe_log: CsvLog) -> list[Evaluator]:
        """Diagnostics, the entries of `evaluators`, and probes on the validation split."""
        cfg = self.cfg
        nodes = {"diagnostics": cfg.diagnostics} if cfg.diagnostics.every else {}
        nodes |= {f"evaluators.{name}": node for name, node in cfg.evaluators.items()}
        parts: dict[str, Any] = {
            "loader": self.loader,
            "relation": self.relation,
            "loss": self.loss,
            "folder": folder,
        }
        evaluators: list[Evaluator] = [build_node(key, node, **parts) for key, node in nodes.items()]
        if cfg.probe.every:
            kind = BestEpoch if cfg.probe.keep == "best" else ProbeEvaluator
            evaluators.append(kind(cfg.probe.every, self.data, self.classifiers, probe_log))
        check_columns(self.solver_class.columns, self.loss.weights, evaluators)
        for evaluator in evaluators:
            evaluator.check(self.model)
        return evaluators


def build(cfg: DictConfig, data: DataSet | None = None, init_weights: bool = True) -> Experiment:
    """Build and check the parts of a run. Raises UsageError for a run that cannot work.

    `data` saves reading the data set again. `init_weights=False` leaves out `cfg.init_weights`, for a run
    that resumes.
    """
    check_values(cfg)
    check_training(cfg)
    device = choose_device(cfg.device, distributed.rank_info())
    switches = numerics.apply(device, cfg.precision, cfg.deterministic)  # before anything that uses CUDA
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.check_devices(device)
    keep_freed_memory(device)
    solver_class: type[Solver] = get_class(cfg.solver._target_)
    precision = solver_precision(cfg, solver_class, device)
    torch.manual_seed(cfg.seed)  # for a loss with random initial parameters
    loss = build_node("loss", cfg.loss).to(device)
    relation = build_node("relation", cfg.relation)
    augment = build_node("views", cfg.views, without=("preview", "resolutions"))
    classifiers = build_classifiers(cfg, cfg.probe.probes)
    logger = build_node("logger", cfg.logger) if cfg.logger._target_ is not None else None
    solver_class.check_loss(loss, relation)
    if solver_class.trains:  # wrong options are refused before the data set is read
        build_optimizer(cfg, nn.ParameterList([torch.zeros(1)]))
    if data is None:
        data = read_data(cfg, device)
    check_fit(cfg, data, relation)
    fresh_backbone = partial(build_backbone, cfg, data, device)
    backbone = distributed.sync_batchnorm(fresh_backbone())
    initial_weights = None
    if cfg.init_weights is not None and init_weights:
        options = {"backbone": cfg.backbone, "channels": data.channels, "image_size": data.image_size}
        initial_weights = weights.load_backbone(backbone, Path(cfg.init_weights).expanduser(), options)
    if isinstance(backbone, LinearBackbone) and not solver_class.trains:
        projector: nn.Module = nn.Identity()  # the backbone itself is solved for
    else:
        projector = build_node("projector", cfg.projector, features=backbone.width).to(device)
    model = SSLModel(backbone, distributed.sync_batchnorm(projector), cfg.channels_last)
    check_parts(cfg, data, augment, relation, loss, model, solver_class)
    return Experiment(
        cfg=cfg,
        device=device,
        precision=precision,
        numerics=switches,
        data=data,
        loader=MultiViewLoader(
            data,
            augment,
            V=cfg.V,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            epochs=cfg.epochs,
            resolutions=cfg.views.resolutions or (None,),
        ),
        relation=relation,
        loss=loss,
        model=model,
        optimizer=build_optimizer(cfg, model, loss) if solver_class.trains else None,
        solver_class=solver_class,
        classifiers=classifiers,
        fresh_backbone=fresh_backbone,
        initial_weights=initial_weights,
        logger=logger,
    )


def build_node(
    key: str, node: DictConfig, *, without: Sequence[str] = (), partial: bool = False, **parts: Any
) -> Any:
    """Call the `_target_` of a config node with its settings, except those in `without`, and with `parts`.

    Raises UsageError if the target does not accept them.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True)
    # twice, because instantiate resolves interpolations twice
    settings = escape(escape({name: plain[name] for name in plain if name not in without}))
    try:
        return instantiate(settings, **parts, _partial_=partial, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError | MemoryError):
            raise error.__cause__ from error
        nested = re.search(r"full_key: (\S+)", str(error))
        part = f"{key}.{nested[1]}" if nested else key
        raise UsageError(of_part(part, error.__cause__ or error)) from error


def build_classifiers(cfg: DictConfig, names: Iterable[str]) -> dict[str, Classifier]:
    """The classifiers of frozen features with these names, in the same order."""
    nodes = {f"probe.classifiers.{name}": cfg.probe.classifiers[name] for name in names}
    built = {key: build_node(key, node, partial=True) for key, node in nodes.items()}
    check_arguments(built)
    return {key.rpartition(".")[2]: classifier for key, classifier in built.items()}


def baseline_cache(
    cfg: DictConfig, data: DataSet, draws: Sequence[LabelDraw | None], switches: dict[str, bool], K: int
) -> BaselineCache:
    """The cache of probe rows that do not depend on the training, or one without files if it is off.

    `switches` are those that `numerics.apply` returned. `random_init` with downloaded weights of timm is not
    cached: their name does not identify their version.
    """
    probe: Any = OmegaConf.to_container(cfg.probe, resolve=True)
    names = [name for name in probe["probes"] if name != "finetune"]
    settings = {
        "classifiers": [[name, probe["classifiers"][name]] for name in names],
        "draws": [draw and draw.identity() for draw in draws],
        "split_seed": cfg.dataset.split_seed,  # of the classifiers
        "numerics": switches,
    }
    backbone: Any = OmegaConf.to_container(cfg.backbone, resolve=True)
    initial = {"seed": cfg.seed, "channels_last": cfg.channels_last, "backbone": backbone}
    networks: dict[str, Any] = {"pixels": {}, "pca": {"K": K}, "lda": {}}
    if not backbone.get("pretrained"):
        networks["random_init"] = initial
    root = Path(os.environ.get("SSL_RUNNER_DATA") or "~/.cache/ssl_runner").expanduser()
    return BaselineCache(root / "baselines" if probe.get("cache", True) else None, data, settings, networks)


def read_data(cfg: DictConfig, device: torch.device) -> DataSet:
    """Read the data set. Raises UsageError if it cannot be read."""
    reader = build_node("dataset", cfg.dataset, without=DATASET_SETTINGS + EVALUATION, partial=True)
    check_arguments({"dataset": reader})
    settings = {name: cfg.dataset[name] for name in DATASET_SETTINGS}
    if cfg.profile and cfg.dataset.subset is not None:
        settings["subset"] = dataset.Nearest(cfg.dataset.subset)  # debug=profile does not know the data set
    with distributed.rank_zero_first():
        data = dataset.load(reader, device=device, **settings)
    return data.with_transform(*(cfg.dataset[name] for name in EVALUATION))


def build_backbone(cfg: DictConfig, data: DataSet, device: torch.device) -> Backbone:
    """The backbone for these images, with the initial weights of the run's seed."""
    torch.manual_seed(cfg.seed)
    backbone = build_node("backbone", cfg.backbone, channels=data.channels, image_size=data.image_size)
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    return backbone.to(device, memory_format=memory_format)


def build_optimizer(cfg: DictConfig, *modules: nn.Module) -> Optimizer:
    algorithm = build_node("optimizer", cfg.optimizer, without=OPTIMIZER_SETTINGS, partial=True)
    return optimizer.build(modules, algorithm, cfg.optimizer.lr, cfg.optimizer.weight_decay)


def check_jobs(jobs: Iterable[tuple[str, DictConfig]], search: bool = False) -> None:
    """Build every job of a sweep, reading each data set once. Raises UsageError for the first that fails.

    A `search` maximises the accuracy on the validation split, so its images must have labels.
    """
    read: dict[str, DataSet] = {}
    for overrides, cfg in jobs:
        key = OmegaConf.to_yaml(cfg.dataset, resolve=True) + cfg.device
        try:
            read[key] = build(cfg, read.get(key)).data
            if search and not read[key].classes:
                raise UsageError(
                    "hydra/sweeper=optuna: expected images with labels, because a search maximises the"
                    " validation accuracy; use a grid"
                )
        except UsageError as error:
            raise UsageError(f"{error} (in the sweep's job {overrides})") from error


def solver_precision(cfg: DictConfig, solver: type[Solver], device: torch.device) -> str:
    if solver.trains:
        return choose_precision(cfg.precision, device)
    if cfg.precision not in ("auto", "fp32"):
        raise UsageError(
            f"precision={cfg.precision}: {solver.__name__} computes in fp32 and fp64; use auto or fp32"
        )
    return "fp32"
