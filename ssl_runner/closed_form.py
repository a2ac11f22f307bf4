"""The other solver: the exact linear map on frozen features, from moments streamed over batches and augmentation draws."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ssl_runner import distributed
from ssl_runner.backbone import LinearBackbone
from ssl_runner.dataset import DataSet
from ssl_runner.errors import Refused
from ssl_runner.linear import Centred, Moments, optimum
from ssl_runner.loss import Loss
from ssl_runner.relate import Batch, BatchRelation, Labels, Views
from ssl_runner.views import Augment

CHUNK = 1024  # originals
FORWARD = 512  # rows that a frozen network takes at once


class ClosedForm:
    """A solver as `Pretraining` is one, with a single `epoch` of `passes` passes over the pretraining images, each of which draws
    V fresh views of each image. It sets the backbone, if that is linear, or else the projector to the loss's closed form.

    Pairs lie within batches of batch_size originals, but for labels, which relate all rows of all passes. Several processes all
    solve the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        loss: Loss,
        data: DataSet,
        augment: Augment,
        relation: BatchRelation,
        *,
        V: int,
        batch_size: int,
        passes: int,
        ridge: float,
        seed: int,
        save: Callable[[dict[str, Any]], None] = lambda state: None,
    ):
        self.backbone, self.projector, self.loss, self.data = backbone, projector, loss, data
        self.augment, self.relation, self.V, self.batch_size = augment, relation, V, batch_size
        self.total_epochs, self.ridge, self.seed, self.save = passes, ridge, seed, save
        self.epoch = 0
        self.last_row: dict[str, Any] = {}

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Solves, and yields the one row of metrics. Raises Refused where all features are constant."""
        if not self.last_row:
            with distributed.alone():
                self.solve()
            self.save(self.state_dict())
        self.epoch = self.total_epochs
        yield self.last_row

    def solve(self) -> None:
        """Sets the matrix to the closed form, and `last_row` to what there is to say of it."""
        start = time.perf_counter()
        frozen, matrix = parts(self.backbone, self.projector)
        moments = stream(
            frozen,
            matrix.in_features,
            self.data,
            self.augment,
            self.relation,
            V=self.V,
            batch_size=self.batch_size,
            passes=self.total_epochs,
            seed=self.seed,
        ).centred()
        streamed = time.perf_counter()
        try:
            best = optimum(self.loss, moments, matrix.out_features, self.ridge)
        except ValueError as error:
            raise Refused(f"solver=closed_form: {error}") from error
        with torch.no_grad():
            matrix.weight.copy_(best.W.T)
            matrix.bias.copy_(best.bias)
        end = time.perf_counter()
        steps = self.total_epochs * (len(self.data.pretrain) // self.batch_size)
        self.last_row = {
            "epoch": self.total_epochs,
            "step": steps,
            "images_seen": steps * self.batch_size,
            "seconds": round(end - start, 3),
            "images_per_s": round(steps * self.batch_size / (streamed - start), 1),
            "lr": None,
            "loss": best.value,
            "loss_of": type(best.loss).__name__,
            "loss_is": best.kind,
            "form": best.form,
            "closed_form_rank": best.rank,
            "solve_s": round(end - streamed, 3),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "last_row": self.last_row,
            "backbone": self.backbone.state_dict(),
            "projector": self.projector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.last_row = state["epoch"], state["last_row"]
        self.backbone.load_state_dict(state["backbone"])
        self.projector.load_state_dict(state["projector"])


class MomentsGap:
    """How far a linear model is from the closed form, on one set of moments (those that `ClosedForm` with the same passes and
    seed solves for): columns of metrics.csv for a network that is trained by descent. K: columns of Z."""

    COLUMNS = ("moments_loss", "moments_floor", "moments_floor_is")

    def __init__(self, moments: Centred, loss: Loss, K: int):
        self.moments, self.best = moments, optimum(loss, moments, K)

    def __call__(self, matrix: nn.Linear) -> dict[str, Any]:
        """The loss of Z = (X - mean) W over all rows of the moments, the closed form's, and whether that is exact or a bound."""
        W, bias = (parameter.detach().cpu().double() for parameter in (matrix.weight.T, matrix.bias))
        value = self.moments.value(self.best.loss, W, self.moments.mean @ W + bias)
        values = (value, self.best.value, self.best.kind)
        return dict(zip(self.COLUMNS, values, strict=True))


def parts(backbone: nn.Module, projector: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """What stays as it is, and the matrix to be found. Refused where neither backbone nor projector is one matrix."""
    if isinstance(backbone, LinearBackbone) and isinstance(projector, nn.Identity):
        flatten, matrix = backbone.body.children()
    else:
        flatten, matrix = backbone, projector
    if not isinstance(matrix, nn.Linear):
        raise Refused("solver=closed_form finds one matrix on top of the backbone: use projector=linear")
    return flatten, matrix


@torch.no_grad()
def stream(
    frozen: nn.Module,
    D: int,
    data: DataSet,
    augment: Augment,
    relation: BatchRelation,
    *,
    V: int,
    batch_size: int,
    passes: int,
    seed: int,
) -> Moments:
    """The moments of the features, D of each row, over all batches and passes. Where it makes no difference to G, for views and
    labels, batches are of CHUNK originals, since few large products take less time than many small ones."""
    device = data.mean.device
    steps = len(data.pretrain) // batch_size
    order_generator = torch.Generator().manual_seed(seed)
    view_generator = torch.Generator(device).manual_seed(seed)
    orders = [
        torch.randperm(len(data.pretrain), generator=order_generator)[: steps * batch_size]
        for _ in range(passes)
    ]
    if isinstance(relation, Labels):
        sizes = torch.bincount(data.pretrain.y.cpu()[torch.cat(orders)], minlength=len(data.classes)) * V
        moments = Moments(D, device, sizes.to(device), relation.normalized)
    else:
        moments = Moments(D, device)
    size = max(batch_size, CHUNK) if isinstance(relation, Views | Labels) else batch_size
    frozen.eval()
    total, disable = passes * steps * batch_size, None if distributed.leads() else True
    with tqdm(total=total, desc="moments", unit="images", unit_scale=True, disable=disable) as bar:
        for order in orders:
            rows = data.pretrain.rows[order].split(size)
            batches = data.pretrain.batches(order, size, device)
            for rows_of_batch, (images, labels) in zip(rows, batches, strict=True):
                views = augment(images, V, data.mean, data.std, view_generator)
                X = torch.cat([frozen(some).flatten(1) for some in views.split(FORWARD)])
                if isinstance(relation, Labels):
                    moments.add_classes(X, labels.repeat(V))
                else:
                    G = relation(Batch(rows_of_batch, labels, V, len(data.classes)), X)
                    if G.support is not None:
                        raise Refused("solver=closed_form relates rows of one batch: set relation.queue=0")
                    moments.add(X, G)
                bar.update(len(labels))
    return moments
