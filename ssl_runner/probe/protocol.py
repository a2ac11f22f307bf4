"""The probe protocol: fit on `train`, select on `val`, then score `test` once, on frozen features."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ssl_runner import distributed
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.images import Images
from ssl_runner.device import synchronize
from ssl_runner.model import eval_mode
from ssl_runner.probe.shares import LabelDraw
from ssl_runner.views import normalize, to_unit

BATCH_VALUES = 512 * 3 * 96 * 96  # of the images in a batch of `extract`


class Probe(ABC):
    """A classifier of features X (n, d), float32, with labels y (n,) in 0 .. classes - 1.

    `hyperparameter` is the name of the setting that the validation split selects.
    """

    hyperparameter: str

    @abstractmethod
    def __init__(self, X: Tensor, y: Tensor, classes: int): ...

    @abstractmethod
    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (value, scores (m, classes) of X_eval (m, d)) for each value of the hyperparameter."""

    @abstractmethod
    def scores(self, value: float, X_eval: Tensor) -> Tensor:
        """Return the scores (m, classes) of X_eval (m, d) at one value of the hyperparameter."""


Classifier = Callable[[Tensor, Tensor, int], Probe]  # a Probe class, or a partial of one with its options


@torch.no_grad()
def extract(network: nn.Module, images: Images, mean: Tensor, std: Tensor) -> Tensor:
    """Return the features (n, d), float32, of n unaugmented images.

    The network runs in eval mode, and the previous mode of every module is restored. Batches are distributed
    round-robin over the ranks, and the features are all-gathered: every rank returns all of them. They have
    512 images, and fewer above 96 pixels, since activations grow with the image.
    """
    batch_size = min(512, max(1, BATCH_VALUES // images.images[0].numel()))
    with eval_mode(network):
        shards = distributed.shard_indices(len(images), batch_size)
        batches = images.batches(shards[distributed.rank()], batch_size, mean.device)
        features, filled = torch.empty(0), 0
        for x, _ in batches:
            part = network(normalize(to_unit(x), mean, std)).flatten(1)
            if not filled:  # one allocation: concatenating the batches would take twice the memory
                features = part.new_empty(len(shards[distributed.rank()]), part.shape[1], dtype=torch.float32)
            features[filled : filled + len(part)] = part
            filled += len(part)
    return distributed.unshard(features, shards)


def evaluate(
    features: str,
    network: nn.Module,
    data: DataSet,
    classifiers: Mapping[str, Classifier],
    score_test: bool,
    draws: Sequence[LabelDraw | None] = (None,),
) -> Iterator[dict[str, Any]]:
    """Yield rows of probe.csv for one network. `features` is the name of its features in the table.

    Each classifier is fitted on `train`, and its hyperparameter is selected on `val`. With `score_test` it is
    then fitted on both and scored once on `test`. top1 and top5 are fractions in [0, 1]; top5 is None for
    five classes or fewer. `seconds` covers the probe and the extraction of the features that it is fitted on,
    measured after host-device syncs.
    The classifiers are distributed over the ranks.

    `draws` are the subsets of `train` to fit on, None for all of it. For a subset, `val` only selects: the
    probe that is scored on `test` is fitted on the subset alone.
    """
    device = data.mean.device
    synchronize(device)
    start = time.perf_counter()
    X, X_val = (extract(network, part, data.mean, data.std) for part in (data.train, data.val))
    X_both = torch.cat([X, X_val])
    X, X_val = X_both.split([len(X), len(X_val)])  # views: wide features are not stored twice
    y, y_val, classes = data.train.y, data.val.y, len(data.classes)
    synchronize(device)
    extraction = time.perf_counter() - start
    X_test = extract(network, data.test, data.mean, data.std) if score_test else None
    synchronize(device)

    def fit(draw: LabelDraw | None, name: str) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        X_fit, y_fit = X, y
        if draw is not None:
            positions = draw.positions.to(X.device)
            X_fit, y_fit = X[positions], y[positions]
        probe = classifiers[name](X_fit, y_fit, classes)
        chosen, scores = best_of(probe.path(X_val), y_val)
        selection = f"{probe.hyperparameter}={chosen:g} (val)"

        def row(train_split: str, eval_split: str, n_train: int, scores: Tensor, y: Tensor) -> dict[str, Any]:
            top = accuracies(scores, y)  # reads results: the device is done
            return {
                "probe": name,
                "features": features,
                "dataset": data.name,
                "train_split": train_split,
                "eval_split": eval_split,
                "selection": selection,
                "n_train": n_train,
                **top,
                "seconds": extraction + time.perf_counter() - start,
                **(draw.columns() if draw is not None else {}),
            }

        yield row("train", "val", len(y_fit), scores, y_val)
        if X_test is not None and draw is not None:
            yield row("train", "test", len(y_fit), probe.scores(chosen, X_test), data.test.y)
        elif X_test is not None:
            y_both = torch.cat([y, y_val])
            scores = classifiers[name](X_both, y_both, classes).scores(chosen, X_test)
            yield row("train+val", "test", len(y_both), scores, data.test.y)

    tasks, ranks = list(product(draws, classifiers)), distributed.world_size()
    rows = distributed.all_gather_object([list(fit(*task)) for task in tasks[distributed.rank() :: ranks]])
    for number in range(len(tasks)):
        yield from rows[number % ranks][number // ranks]


def best_of(path: Iterable[tuple[float, Tensor]], y: Tensor, patience: int = 2) -> tuple[float, Tensor]:
    """Return the hyperparameter with the highest top-1 accuracy, and its scores (n, classes).

    `path` yields (hyperparameter, scores) in order. Ties go to the earlier one. The search stops after
    `patience` consecutive values without improvement.
    """
    best, worse = (-1.0, 0.0, torch.empty(0)), 0
    for setting, scores in path:
        top1 = accuracies(scores, y)["top1"] or 0.0
        best, worse = ((top1, setting, scores), 0) if top1 > best[0] else (best, worse + 1)
        if worse == patience:
            break
    return best[1], best[2]


def accuracies(scores: Tensor, y: Tensor) -> dict[str, float | None]:
    """Return top-1 and top-5 accuracy in [0, 1] for scores (n, classes) and labels y (n,).

    Of equal scores the class with the lower number ranks first. A label whose score is NaN or -inf, as that
    of a class without a vote, is never among the top. top5 is None for five or fewer classes.
    """
    own, number = scores.gather(1, y[:, None]), torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (number < y[:, None]))
    rank = ahead.sum(1).where(own[:, 0] > -torch.inf, scores.shape[1])
    top1, top5 = ((rank < k).sum().item() / len(y) for k in (1, 5))
    return {"top1": top1, "top5": top5 if scores.shape[1] > 5 else None}
