"""Checks of a run that need its data or its networks. Those of the configuration alone are in `config`."""

from collections.abc import Mapping
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ssl_runner import distributed
from ssl_runner.backbone import Backbone, output_of
from ssl_runner.config.compose import CONF
from ssl_runner.config.rules import format_value
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.splits import balanced_size
from ssl_runner.degenerate import check_features, check_gradient, check_pairs, sample_batch
from ssl_runner.errors import UsageError, of_part
from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel, eval_mode
from ssl_runner.probe import check_layer
from ssl_runner.relation import Relation
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.solver import Solver
from ssl_runner.views import Augment


def check_parts(
    cfg: DictConfig,
    data: DataSet,
    augment: Augment,
    relation: RelationBuilder,
    loss: Loss,
    model: SSLModel,
    solver: type[Solver],
) -> None:
    """Raise UsageError if parts of a run do not fit each other. The relation is bound to the data set."""
    check_features(model.backbone, data)
    solver.check_model(model)
    check_loss(cfg, loss, relation, data, solver, model.K)
    if solver.trains:
        check_pairs(cfg, relation, data, model.K)
        check_gradient(cfg, loss, model.K)
    if cfg.probe.layer is not None:
        image = (data.channels, data.image_size, data.image_size)
        check_layer(model.backbone, cfg.probe.layer, image, data.mean.device)
    check_view_sizes(cfg, augment, solver, model.backbone, data)
    check_blur(cfg, augment, data)


def check_view_sizes(
    cfg: DictConfig, augment: Augment, solver: type[Solver], backbone: Backbone, data: DataSet
) -> None:
    """Raise UsageError for sizes that the backbone does not accept, or resolutions that no training uses."""
    if cfg.views.resolutions is not None and not solver.trains:
        raise UsageError(
            f"views.resolutions={format_value(cfg.views.resolutions)}: expected null for {solver.__name__},"
            " which does not train; leave it out"
        )
    resolutions = cfg.views.resolutions or []
    option = f"views.resolutions={format_value(resolutions)}"
    given = {side: (option, f"leave {side} out") for side in resolutions}
    if isinstance(augment, Augment):
        named = zip(cfg.views.policies, augment.sizes, strict=True)
        given |= {
            side: (f"views.policies.{name}.size={side}", "set another size") for name, side in named if side
        }
    for side, (option, remedy) in given.items():
        with eval_mode(backbone):
            features = output_of(backbone, data.channels, side, data.mean.device)
        if isinstance(features, Exception):
            raise UsageError(
                f"{option}: expected sizes that this backbone accepts, found {side} x {side} pixels; {remedy}"
            ) from features


def check_arguments(partials: Mapping[str, Any]) -> None:
    """Raise UsageError for options that a part which is called later lacks.

    partials: functools.partial of a class or function, by its key in the configuration.
    """
    for key, part in partials.items():
        try:
            signature(part.func).bind_partial(**part.keywords)
        except TypeError as error:
            raise UsageError(of_part(key, error)) from error


def check_blur(cfg: DictConfig, augment: Augment, data: DataSet) -> None:
    """Raise UsageError for a blur kernel that is larger than the views."""
    side = data.stored_size
    if not isinstance(augment, Augment):  # a user's views may have no policies
        return
    for policy, size in zip(augment.policies, augment.sizes, strict=True):
        try:
            for view_side in [size] if size else cfg.views.resolutions or [data.image_size]:
                policy.kernel((side, side), (view_side, view_side))
        except ValueError as error:
            raise UsageError(f"views: {error}") from error


def check_fit(cfg: DictConfig, data: DataSet, relation: RelationBuilder) -> None:
    """Bind the relation to the data set.

    Raises UsageError if batch size, relation and data set do not fit each other.
    """
    size, images, ranks = cfg.batch_size, len(data.pretrain), distributed.world_size()
    if size > images:
        raise UsageError(
            f"batch_size={size}: expected at most {images}, the pretraining images of {data.name}; use a"
            " smaller batch"
        )
    if size % ranks:
        raise UsageError(
            f"batch_size={size}: expected a multiple of {ranks}, the number of processes; use one"
        )
    if size < relation.min_batch_size:
        raise UsageError(
            f"batch_size={size}: expected at least {relation.min_batch_size}, because this relation finds"
            " neighbours within the batch; use a larger batch or a smaller relation.k"
        )
    if not data.classes:
        check_unlabelled(cfg, data)
    relation.bind(data.pretrain.labels.cpu())
    relation.check_images(data.pretrain.indices)
    if relation.needs_labels and bool((data.pretrain.y < 0).any()):
        raise UsageError(
            f"relation: expected a label for every image, but {data.name} has unlabelled images; use"
            " relation=views"
        )
    if relation.count_pairs(data.pretrain.indices) == 0:
        raise UsageError(
            f"relation.path={cfg.relation.get('path')}: expected pairs of the {images} pretraining images,"
            " found none; number the images as conf/relation/edges.yaml describes (validation and test images"
            " do not count)"
        )


def check_loss(
    cfg: DictConfig,
    loss: Loss,
    relation: RelationBuilder,
    data: DataSet,
    solver: type[Solver],
    K: int,
) -> None:
    """Raise UsageError if the loss is not defined for the rows of a training step, or of the diagnostics.

    The relation is bound to the data set. A batch of images spread over the data set represents all of them.
    """
    if loss.needs_views and relation.uses_memory:
        raise UsageError(
            f"relation.queue={cfg.relation.get('queue')}: expected 0 for this loss, which needs rows of views"
            " only; set relation.queue=0"
        )
    uses = {}
    if solver.trains:
        uses[f"batch_size={cfg.batch_size}"] = cfg.batch_size, relation
    if cfg.diagnostics.every:
        number, images = cfg.diagnostics.num_images, data.train if data.classes else data.pretrain
        subset = balanced_size(number, len(images), len(data.classes))
        uses[f"diagnostics.num_images={number}"] = subset, relation.frozen_copy()
    with distributed.local_only():
        for option, (size, builder) in uses.items():
            for G in first_relations(builder, size, cfg.V, K, data):
                option_at_fault = "relation"
                try:
                    loss.check_relation(G)
                    option_at_fault = option
                    loss.check_rows(G.num_rows, K, G.V)
                except ValueError as error:
                    raise UsageError(f"{option_at_fault}: {error}") from error


def first_relations(builder: RelationBuilder, size: int, V: int, K: int, data: DataSet) -> list[Relation]:
    """The relation of a batch at random Z, and of a second one if the builder uses those of the first."""
    positions = torch.linspace(0, len(data.pretrain) - 1, size, device="cpu").long()
    batch, Z = sample_batch(data, positions, V, K, torch.Generator("cpu").manual_seed(0))
    builder = deepcopy(builder) if builder.uses_memory else builder.frozen_copy()
    return [builder(batch, Z) for _ in range(1 + builder.uses_memory)]


def check_unlabelled(cfg: DictConfig, data: DataSet) -> None:
    """Raise UsageError for options of probes that differ from the defaults, since probes need labels."""
    default = OmegaConf.load(CONF / "probe" / "default.yaml")
    for key in ("every", "probes", "features", "labels", "layer"):
        if cfg.probe[key] != (expected := OmegaConf.select(default, key)):
            raise UsageError(
                f"probe.{key}={format_value(cfg.probe[key])}: expected images with labels, which probes need,"
                f" but {data.name} has none; use labelled images, or leave it at {format_value(expected)}"
            )
