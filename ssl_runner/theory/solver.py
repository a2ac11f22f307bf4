"""The closed-form solver: the optimal linear map of frozen features, from second moments of views."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_runner import distributed
from ssl_runner.backbone import LinearBackbone
from ssl_runner.batch import per_size
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.errors import UsageError
from ssl_runner.evaluator import Evaluator
from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel, count_parameters
from ssl_runner.progress import image_progress
from ssl_runner.relation.builders import FromLabels, FromViews, RelationBuilder
from ssl_runner.solver import Save, Solver
from ssl_runner.theory.linear import check_linear_optimum, linear_optimum, value_of
from ssl_runner.theory.moments import Moments

CHUNK = 1024  # images per batch where G does not depend on the batch size
FORWARD_ROWS = 512  # rows per forward pass of the frozen network


class ClosedForm(Solver):
    """Sets one matrix to the closed-form optimum of the loss.

    The matrix is the linear backbone, or a linear projector on a frozen backbone. The moments come from
    `passes` passes over the pretraining images, each with V fresh views per image. Positive pairs lie within
    batches of the loader's batch_size; with labels they span all images of all passes. `ridge` penalises
    directions of small variance, as a share of the mean variance. Every rank computes the same solution.
    """

    def __init__(
        self,
        model: SSLModel,
        loss: Loss,
        loader: MultiViewLoader,
        relation: RelationBuilder,
        *,
        passes: int,
        ridge: float = 0.0,
        save: Callable[[dict[str, Any], Save], None] = lambda state, how: None,
    ):
        self.model, self.loss, self.loader, self.relation = model, loss, loader, relation
        self.total_epochs, self.ridge, self.save = passes, ridge, save
        self.last_row: dict[str, Any] = {}

    @classmethod
    def check_loss(cls, loss: Loss, relation: RelationBuilder) -> None:
        try:
            check_linear_optimum(loss)
        except NotImplementedError as error:
            raise UsageError(f"solver=closed_form: {error}") from error
        if relation.uses_memory:
            raise UsageError("solver=closed_form needs positive pairs within one batch; set relation.queue=0")

    @classmethod
    def check_model(cls, model: SSLModel) -> None:
        split_linear_layer(model)

    @property
    def result_features(self) -> str:
        return "projector" if count_parameters(self.model.projector) else "backbone"

    def warnings(self) -> list[str]:
        images, features = len(self.loader.data.pretrain), split_linear_layer(self.model)[1].in_features
        if self.ridge or images >= features:
            return []
        return [
            f"warning: solver=closed_form: {images} images for {features} features, so the map overfits them;"
            " add solver.ridge=0.1, or use more images"
        ]

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Solve, and yield the only row. Raises UsageError if all features are constant."""
        if not self.last_row:
            with distributed.local_only():
                self._solve()
            self.save(self.state_dict(), Save.WRITE)
        self.epoch = self.total_epochs
        yield self.last_row

    def compile(self, graphs: bool = False) -> str | None:
        self.model.backbone.compile(dynamic=False)
        return "solver=closed_form takes no gradient steps" if graphs else None

    def _solve(self) -> None:
        start = time.perf_counter()
        frozen, matrix = split_linear_layer(self.model)
        moments = stream_moments(
            frozen, matrix.in_features, self.loader, self.relation, self.total_epochs
        ).centred()
        streamed = time.perf_counter()
        try:
            best = linear_optimum(self.loss, moments, matrix.out_features, self.ridge)
        except ValueError as error:
            raise UsageError(f"solver=closed_form: {error}") from error
        with torch.no_grad():
            matrix.weight.copy_(best.W.T)
            matrix.bias.copy_(best.bias)
        end = time.perf_counter()
        steps = self.total_epochs * self.loader.steps_per_epoch
        images = steps * self.loader.batch_size
        self.last_row = {
            "epoch": self.total_epochs,
            "step": steps,
            "images_seen": images,
            "seconds": round(end - start, 3),
            "images_per_s": round(images / (streamed - start), 1),
            "lr": None,
            "loss": best.value,
            "loss_name": type(best.loss).__name__,
            "loss_kind": best.kind,
            "form": best.form,
            "closed_form_rank": best.rank,
            "solve_s": round(end - streamed, 3),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "last_row": self.last_row,
            "backbone": self.model.backbone.state_dict(),
            "projector": self.model.projector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.last_row = state["epoch"], state["last_row"]
        self.model.backbone.load_state_dict(state["backbone"])
        self.model.projector.load_state_dict(state["projector"])


class MomentsGap(Evaluator):
    """Columns of metrics.csv: the loss of a linear model and of its closed form, on the same second moments.

    The moments come from `passes` passes, as those of ClosedForm with the same seed. For backbone=linear
    projector=identity.
    """

    columns = ("moments_loss", "moments_closed_form", "moments_closed_form_kind")

    def __init__(
        self,
        loader: MultiViewLoader,
        relation: RelationBuilder,
        loss: Loss,
        folder: Path,
        *,
        passes: int,
        every: int = 1,
    ):
        super().__init__(every)
        check_linear_optimum(loss)
        self.loader, self.relation, self.loss, self.passes = loader.restarted(), relation, loss, passes

    def check(self, model: SSLModel) -> None:
        """Compute the moments and the closed form. Raises UsageError for a model that is not linear."""
        if not isinstance(model.backbone, LinearBackbone) or not isinstance(model.projector, nn.Identity):
            raise UsageError("MomentsGap is for a linear model; use backbone=linear projector=identity")
        frozen, matrix = split_linear_layer(model)
        with distributed.local_only():
            moments = stream_moments(
                frozen, matrix.in_features, self.loader, deepcopy(self.relation), self.passes
            )
        self.moments = moments.centred()
        self.best = linear_optimum(self.loss, self.moments, model.K)

    def evaluate(self, model: SSLModel, epoch: int) -> dict[str, Any]:
        _, matrix = split_linear_layer(model)
        W, bias = (parameter.detach().cpu().double() for parameter in (matrix.weight.T, matrix.bias))
        value = value_of(self.best.loss, self.moments.transform(W, self.moments.mean @ W + bias))
        return dict(zip(self.columns, (value, self.best.value, self.best.kind), strict=True))


def split_linear_layer(model: SSLModel) -> tuple[nn.Module, nn.Linear]:
    """The frozen part of the model, and the linear layer to solve for.

    Raises UsageError if there is no such layer.
    """
    if isinstance(model.backbone, LinearBackbone) and isinstance(model.projector, nn.Identity):
        frozen, matrix = model.backbone.body.children()
    else:
        frozen, matrix = model.backbone, model.projector
    if not isinstance(matrix, nn.Linear):
        raise UsageError(
            "solver=closed_form solves for one linear layer on the backbone; use projector=linear"
        )
    return frozen, matrix


@torch.no_grad()
def stream_moments(
    frozen: nn.Module, D: int, loader: MultiViewLoader, relation: RelationBuilder, passes: int
) -> Moments:
    """Second moments of the features (D columns) of all views of `passes` epochs of the loader.

    Raises UsageError for a relation to rows outside the batch. Batches hold CHUNK images where this leaves G
    unchanged (views and labels): a few large products are faster than many small ones.
    """
    device = loader.device
    if relation.uses_memory:
        raise UsageError("second moments need positive pairs within one batch; set relation.queue=0")
    # a subclass may relate other rows
    of_classes = type(relation) is FromLabels and relation.path is None
    if of_classes:
        positions = torch.cat([loader.order(number) for number in range(passes)])
        images_per_class = torch.bincount(
            loader.data.pretrain.y.cpu()[positions], minlength=len(loader.data.classes)
        )
        moments = Moments(D, device, (images_per_class * loader.V).to(device), relation.normalized)
    else:
        moments = Moments(D, device)
    size = loader.batch_size
    if of_classes or type(relation) is FromViews:
        size = max(size, CHUNK)
    frozen.eval()
    total = passes * loader.steps_per_epoch * loader.batch_size
    with image_progress("moments", total, hidden=not distributed.is_main_process(), leave=False) as bar:
        for number in range(passes):
            for views, batch in loader.batches(number, size=size):
                parts = [x for block in per_size(views) for x in block.split(FORWARD_ROWS)]
                X = torch.cat([frozen(x).flatten(1) for x in parts])
                if of_classes:
                    moments.add_classes(X, batch.labels.repeat(loader.V))
                else:
                    moments.add(X, relation(batch, X))
                bar.update(len(batch.labels))
    return moments
