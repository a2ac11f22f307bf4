"""Builders of the relation G of a batch: from its views, its labels, a file of pairs, or its embeddings."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from ssl_runner.batch import Batch
from ssl_runner.device import to_device
from ssl_runner.errors import UsageError, one_line
from ssl_runner.relation import derived, operators
from ssl_runner.relation.base import RelationBuilder
from ssl_runner.relation.files import read_labels, read_pairs
from ssl_runner.relation.nearest import nearest_of_other_images
from ssl_runner.relation.operators import Relation
from ssl_runner.relation.shared_labels import SharedLabels


class FromViews(RelationBuilder):
    """Rows are positives iff they are views of the same image."""

    shardable = capturable = True

    def __init__(self, normalized: bool = False):
        self.normalized = normalized

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        return operators.Views(len(batch.labels), batch.V, self.normalized, batch.labels.device)


class FromLabels(RelationBuilder):
    """Rows are positives iff they have the same label (supervised SSL).

    `path`: a file of several labels per image, instead of the data set's classes. It is a CSV with a header
    and one column of 0 and 1 per label, or an npz with such an array Y (images, labels). Its rows are all
    images of the data set, in the order that FromEdges documents. Rows are then positives iff their images
    share a label. With `weighted`, G_ij is the number of shared labels, which needs no list of pairs.

    Raises ValueError for `weighted` without `path`.
    """

    shardable = capturable = True

    def __init__(self, normalized: bool = False, path: str | None = None, weighted: bool = False):
        if weighted and path is None:
            raise ValueError(
                "weighted=true: expected relation.path=<file>, since images of one class share one label;"
                " give a file of labels or leave weighted out"
            )
        self.normalized, self.path, self.weighted, self.needs_labels = (
            normalized,
            path,
            weighted,
            path is None,
        )
        self.shardable = type(self).shardable and (path is None or weighted)
        self.capturable = type(self).capturable and path is None

    def bind(self, labels: Tensor) -> None:
        if self.path is not None:
            self.Y = read_file(self.path, "labels, one row per image", partial(read_labels, num=len(labels)))

    def check_images(self, indices: Tensor) -> None:
        if self.path is not None and (missing := int((self.Y[indices.numpy()].sum(1) == 0).sum())):
            raise UsageError(
                f"relation.path={self.path}: {missing} of the {len(indices)} pretraining images have no"
                " label; give every image at least one"
            )

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        if self.path is None:
            return operators.Labels(batch.labels.repeat(batch.V), batch.num_classes, self.normalized)
        Y = self.Y[batch.indices.numpy()]
        if self.weighted:
            rows = to_device(torch.from_numpy(Y.toarray()), batch.labels.device)
            return SharedLabels(rows.repeat(batch.V, 1), self.normalized)
        return of_graph(Y @ Y.T, batch, self.normalized)


class FromNeighbors(RelationBuilder):
    """Views of the same image are positives, and so are an image and its k nearest neighbours.

    Neighbours are the images of highest cosine similarity. An image's embedding is the mean over its views.

    queue = 0: neighbours are searched within the batch. Two images are positives iff at least one is among
    the k nearest neighbours of the other. If the batch has fewer than k other images, all of them are
    neighbours.

    queue > 0: neighbours are searched among the last `queue` images of earlier batches, the image itself
    excluded (the support set of NNCLR, Dwibedi et al. 2021). Their embeddings are appended to Z as constants.
    G contains the views only until the queue holds k other entries for every image.

    Raises ValueError for k < 1, and for 0 < queue <= k.
    """

    depends_on_embeddings = capturable = True

    def __init__(self, k: int = 1, queue: int = 0, normalized: bool = False):
        if k < 1 or (queue and queue <= k):
            raise ValueError(
                f"k={k}, queue={queue}: expected k >= 1, and queue=0 or queue > k;"
                " set queue=0 to search within the batch"
            )
        self.k, self.size, self.normalized = k, queue, normalized
        self.uses_memory = queue > 0
        self.capturable = type(self).capturable and queue == 0
        self.min_batch_size = 1 if queue else k + 1
        # (size, K) ring buffer of embeddings, and the number of embeddings ever added
        self.queue, self.seen = torch.empty(0, device="cpu"), 0
        self.indices = torch.empty(queue, dtype=torch.int64, device="cpu")  # of the images in the queue

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        embeddings = Z.float().reshape(batch.V, len(batch.indices), -1).mean(0)
        G = self.in_queue(embeddings, batch) if self.size else self.in_batch(embeddings, batch)
        return derived.DegreeNormalized(G) if self.normalized else G

    def in_batch(self, embeddings: Tensor, batch: Batch) -> Relation:
        """Relation with the neighbours within the batch. embeddings (n, K)."""
        images = torch.arange(len(embeddings), device=embeddings.device)
        k = min(self.k, len(embeddings) - 1)
        nearest = nearest_of_other_images(embeddings, embeddings, k, images, images)
        return derived.ViewExpanded(operators.KNearest(nearest), batch.V)

    def in_queue(self, embeddings: Tensor, batch: Batch) -> Relation:
        """Relation with the neighbours in the queue; then adds the embeddings (n, K) to the queue."""
        n, device = embeddings.shape[0], embeddings.device
        filled = min(self.seen, self.size)
        queue, indices = self.queue[:filled].to(device), self.indices[:filled]
        if filled and filled - np.bincount(indices.numpy()).max() >= self.k:
            images = to_device(batch.indices, device), to_device(indices, device)
            nearest = nearest_of_other_images(embeddings, queue, self.k, *images)
            G: Relation = derived.WithSupportSet(n, batch.V, queue[nearest].flatten(0, 1))
        else:
            G = operators.Views(n, batch.V, device=device)
        if not self.seen:
            self.queue = embeddings.new_zeros(self.size, embeddings.shape[1])
        newest = embeddings[-self.size :]
        places = (self.seen + torch.arange(len(newest), device="cpu")) % self.size
        self.queue = self.queue.to(device).index_copy(0, to_device(places, device), newest)
        self.indices = self.indices.index_copy(0, places, batch.indices[-self.size :])
        self.seen += len(newest)
        return G

    def frozen_copy(self) -> "FromNeighbors":
        return FromNeighbors(self.k, normalized=self.normalized)

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue, "indices": self.indices, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue, self.indices, self.seen = state["queue"], state["indices"], state["seen"]


class FromEdges(RelationBuilder):
    """Views of the same image are positives, and so are the views of two images that a file lists as a pair.

    `path`: a CSV with a header and two columns of image indices, or an npz with arrays i and j. Pairs with an
    image outside the batch are ignored. Indices count all images of the data set from 0, in the order of its
    reader in `ssl_runner.data`:

    - mnist5k: the order of the file in the package, in which training and test images are mixed
    - cifar10, cifar100, stl10: training, test, then unlabelled images, each in torchvision's order
    - folder: train, test, val, then unlabelled images; within each, classes by name, then files by path
    """

    def __init__(self, path: str | None = None, normalized: bool = False):
        self.path, self.normalized = path, normalized

    def bind(self, labels: Tensor) -> None:
        A = read_file(
            self.path,
            "pairs of image indices",
            lambda path: operators.Edges(*read_pairs(path), num_rows=len(labels)),
        )
        i, j = A.edges().numpy()
        self.adjacency = scipy.sparse.csr_array(
            (np.ones(len(i), dtype=np.float32), (i, j)), shape=(len(labels),) * 2
        )

    def count_pairs(self, indices: Tensor) -> int:
        return self.adjacency[indices.numpy()][:, indices.numpy()].nnz // 2

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        indices = batch.indices.numpy()
        return of_graph(self.adjacency[indices][:, indices], batch, self.normalized)


def of_graph(graph: scipy.sparse.csr_array, batch: Batch, normalized: bool) -> Relation:
    """The relation of a batch in which images are positives iff the symmetric graph (n, n) joins them."""
    upper = scipy.sparse.triu(graph, 1)
    i, j = (torch.from_numpy(side.astype(np.int64)) for side in (upper.row, upper.col))
    A = operators.Edges(i, j, len(batch.indices)).to(batch.labels.device)
    G = derived.ViewExpanded(A, batch.V)
    return derived.DegreeNormalized(G) if normalized else G


def read_file(option: str | None, content: str, read: Callable[[Path], Any]) -> Any:
    """Read the file of relation.path. Raises UsageError if there is none, or if its content is refused."""
    path = None if option is None else Path(option).expanduser()
    if path is None or not path.is_file():
        raise UsageError(f"relation.path={option}: expected an existing file; give a CSV or npz of {content}")
    try:
        return read(path)
    except (ValueError, KeyError, OSError, BadZipFile) as error:
        raise UsageError(f"relation.path={option}: {one_line(error)}") from error


class Rewired(RelationBuilder):
    """The relation of `base` with a fraction of its pairs replaced by random ones: a misspecified G.

    Every batch is rewired anew by `derived.rewire`, on the CPU, from a generator seeded with `seed`, which is
    part of the state_dict. A base that depends on the embeddings costs a host-device sync.

    Raises ValueError for a base with a queue, and for a normalised base: rewiring keeps no weights.
    """

    def __init__(
        self, base: RelationBuilder, rewire_fraction: float = 0.5, seed: int = 0, normalized: bool = False
    ):
        if base.uses_memory:
            raise ValueError(
                "base: expected a relation without a queue, whose support rows cannot be rewired;"
                " set base.queue=0"
            )
        if base.normalized:
            raise ValueError(
                "base.normalized=true: expected false, because rewiring keeps no weights;"
                " set normalized=true of the rewired relation instead"
            )
        if base.weighted:
            raise ValueError(
                "base.weighted=true: expected false, because rewiring keeps no weights; leave it out"
            )
        self.base, self.rewire_fraction, self.normalized = base, rewire_fraction, normalized
        self.needs_labels, self.min_batch_size = base.needs_labels, base.min_batch_size
        self.depends_on_embeddings = base.depends_on_embeddings
        self.generator, self.frozen = torch.Generator("cpu").manual_seed(seed), False

    def bind(self, labels: Tensor) -> None:
        self.labels = labels
        self.base.bind(labels)

    def check_images(self, indices: Tensor) -> None:
        self.base.check_images(indices)

    def count_pairs(self, indices: Tensor) -> int | None:
        return self.base.count_pairs(indices)

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        on_host = replace(batch, labels=self.labels[batch.indices])
        G = self.base(on_host, Z.cpu() if self.depends_on_embeddings else Z)
        generator = self.generator.clone_state() if self.frozen else self.generator
        rewired = derived.rewire(G, self.rewire_fraction, generator).to(batch.labels.device)
        return derived.DegreeNormalized(rewired) if self.normalized else rewired

    def frozen_copy(self) -> "Rewired":
        frozen = copy(self)
        frozen.base, frozen.frozen = self.base.frozen_copy(), True
        frozen.generator = self.generator.clone_state()
        return frozen

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.base.load_state_dict(state["base"])
