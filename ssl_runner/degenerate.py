"""Checks for shapes with which training would fail or learn nothing."""

import math
from copy import deepcopy

import torch
from omegaconf import DictConfig
from torch import Tensor

from ssl_runner import distributed
from ssl_runner.backbone import Backbone, output_of
from ssl_runner.batch import Batch
from ssl_runner.data.dataset import DataSet
from ssl_runner.errors import UsageError, one_line
from ssl_runner.loss import Loss
from ssl_runner.model import eval_mode
from ssl_runner.relation import Views
from ssl_runner.relation.builders import FromLabels, RelationBuilder

ROUNDING = 1e-10  # float64: a gradient below this share of its terms is 0
IMAGES, COLUMNS = 8, 3  # enough for the gradient of every loss, see check_gradient
BATCHES = 8


def check_features(backbone: Backbone, data: DataSet) -> None:
    """Raise UsageError unless the backbone maps an image to `backbone.width` features."""
    side = data.image_size
    with eval_mode(backbone):
        y = output_of(backbone, data.channels, side, data.mean.device)
    if isinstance(y, Exception):
        raise UsageError(
            f"backbone: expected a network for images of shape {(data.channels, side, side)}, but it raises"
            f" '{one_line(y)}'; set dataset.size, or use another network"
        ) from y
    shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    if not isinstance(y, Tensor) or y.ndim < 2 or tuple(y.flatten(1).shape) != (1, backbone.width):
        raise UsageError(
            f"backbone: expected features of shape (rows, {backbone.width}), found {shape} for one image;"
            " pool them over their positions"
        )


def check_pairs(cfg: DictConfig, relation: RelationBuilder, data: DataSet, K: int) -> None:
    """Raise UsageError if in a batch all rows are positives of each other, or none are.

    Each of BATCHES random batches must be so. The relation is bound to the data set. A relation with a queue
    is accepted: it adds positives from outside the batch, which has the negatives.
    """
    if relation.uses_memory:
        return
    given, generator = f"batch_size={cfg.batch_size}", torch.Generator("cpu").manual_seed(0)
    all_negative = all_positive = True
    relation = relation.frozen_copy()
    with distributed.local_only():
        for _ in range(BATCHES):
            positions = torch.randperm(len(data.pretrain), generator=generator, device="cpu")
            batch, Z = sample_batch(data, positions[: cfg.batch_size], cfg.V, K, generator)
            G = relation(batch, Z)
            all_negative &= not G.degrees.any()
            # sum_j G_ij^2 >= d_i^2 / (N - 1), with equality iff row i has N - 1 positives of equal weights
            least = float(G.degrees.double().square().sum()) / (len(Z) - 1)
            all_positive &= math.isclose(float(G.square_norm), least, rel_tol=1e-6) and least > 0
            if not (all_negative or all_positive):
                return
    if all_negative:
        raise UsageError(
            f"{given}: expected positives in a batch, but this relation has none; use a larger batch or"
            " relation=views"
        )
    raise UsageError(
        f"{given}: expected negatives in a batch, but this relation makes positives of all its rows; use"
        " relation=views, a larger batch, more classes or a smaller relation.k"
    )


def sample_batch(
    data: DataSet, positions: Tensor, V: int, K: int, generator: torch.Generator
) -> tuple[Batch, Tensor]:
    """The batch of the pretraining images at positions (n,), and random Z (V n, K), on the CPU."""
    images = data.pretrain
    batch = Batch(images.indices[positions], images.y.cpu()[positions], V, len(data.classes))
    return batch, torch.randn(V * len(positions), K, generator=generator, device="cpu")


def check_gradient(cfg: DictConfig, loss: Loss, K: int) -> None:
    """Raise UsageError if a loss of ssl_runner has gradient 0 for every Z of this run's shape."""
    if message := why_no_gradient(cfg, loss, K):
        raise UsageError(message)


def why_no_gradient(cfg: DictConfig, loss: Loss, K: int, name: str | None = None) -> str:
    """The message for a loss, or a term of it, with gradient 0 for every Z of this run's shape, else "".

    Computed at random Z for up to IMAGES images with their views, and up to COLUMNS columns. A loss of
    another package is not called.
    """
    n, k = min(cfg.batch_size, IMAGES), min(K, COLUMNS)
    if not type(loss).__module__.startswith("ssl_runner.") or has_gradient(loss, n, cfg.V, k, name):
        return ""
    what = f"{type(loss).__name__}'s {name}" if name else type(loss).__name__
    if would_have_gradient(loss, IMAGES, cfg.V, k, name):
        fault, remedy = f"batch_size={cfg.batch_size}: expected more images", "use a larger batch"
    elif would_have_gradient(loss, n, cfg.V, COLUMNS, name):
        option = "projector.K" if "K" in cfg.projector else "backbone.width"
        fault, remedy = f"{option}={K}: expected 2 or more columns", "use more columns"
    elif name:
        fault, remedy = "loss: expected terms with a gradient", "set its weight to 0"
    else:
        fault, remedy = "loss: expected a weight above 0", "raise one of its weights"
    return f"{fault}, because the gradient of {what} is 0 for any Z; {remedy}"


def would_have_gradient(loss: Loss, n: int, V: int, K: int, name: str | None) -> bool:
    """`has_gradient` for another shape than that of the run, which the loss may refuse."""
    try:
        return has_gradient(loss, n, V, K, name)
    except ValueError:
        return False


def has_gradient(loss: Loss, n: int, V: int, K: int, name: str | None = None) -> bool:
    """Whether the loss, or one of its terms, has a gradient at random Z (V n, K)."""
    loss, G = deepcopy(loss).cpu(), Views(n, V, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)

    def at_scale(scale: float) -> bool:
        Z = scale * torch.randn(V * n, K, dtype=torch.float64, generator=generator, device="cpu")
        terms = loss.terms(Z.requires_grad_(), G)
        values = [loss.weights[name] * terms[name] for name in ([name] if name else terms)]
        total = torch.stack(values).sum()
        size = float(torch.stack(values).detach().abs().sum())
        if not total.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(total, Z)
        return bool(gradient.norm() * Z.detach().norm() > ROUNDING * (1 + size))

    with distributed.local_only(), torch.random.fork_rng(devices=[]):
        return any(map(at_scale, (0.3, 1.0, 3.0)))


def warnings(cfg: DictConfig, loss: Loss, relation: RelationBuilder, data: DataSet, K: int) -> list[str]:
    """Lines on terms of the loss without gradient, and on batches with few pairs of the relation."""
    pairs = expected_pairs(relation, data, cfg.batch_size)
    lines = []
    if pairs is not None and pairs < 1:
        lines.append(
            f"warning: batch_size={cfg.batch_size}: on average {pairs:.2g} pairs of images in a batch are"
            " positives, so that most positives are views of one image; use a larger batch"
        )
    used = [name for name, weight in loss.weights.items() if weight]
    messages = [why_no_gradient(cfg, loss, K, name) for name in used]
    return [*lines, *(f"warning: {message}" for message in messages if message)]


def expected_pairs(relation: RelationBuilder, data: DataSet, batch_size: int) -> float | None:
    """Mean number of pairs of different images in a batch that the file or the labels make positives.

    None for relations without a file of pairs and without the labels of the data set.
    """
    images, n = data.pretrain, len(data.pretrain)
    pairs = relation.count_pairs(images.indices)
    if type(relation) is FromLabels and relation.path is None:
        counts = torch.bincount(images.y.cpu())
        pairs = int((counts * (counts - 1) // 2).sum())
    return None if pairs is None else pairs * batch_size * (batch_size - 1) / (n * (n - 1))
