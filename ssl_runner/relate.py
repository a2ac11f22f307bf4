"""How a batch gets its relation G: from its views, its labels, a file of pairs, or the embeddings themselves."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner import relation
from ssl_runner.errors import Refused
from ssl_runner.relation import Relation


@dataclass
class Batch:
    """n originals: rows (n,), their row numbers in the data set, on the host; labels (n,) on the device, -1 where there is
    none; V views of each; the classes of the data set."""

    rows: Tensor
    labels: Tensor
    V: int
    num_classes: int


class BatchRelation(ABC):
    """Makes the relation over the V n views of a batch, view-major. `bind` tells it of the data set before the first batch; what
    it carries from batch to batch is in its state_dict, which belongs in a checkpoint."""

    needs_labels: ClassVar[bool] = False

    def bind(self, labels: Tensor) -> None:
        """labels (n,): those of every row of the data set, on the host. Raises Refused for what does not fit it."""

    @abstractmethod
    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        """The relation of a batch with embeddings Z (V n, K), which carry no gradient."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what state_dict gave."""


class Views(BatchRelation):
    """Rows are positives iff they are views of one original."""

    def __init__(self, normalized: bool = False):
        self.normalized = normalized

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        return relation.Views(len(batch.labels), batch.V, self.normalized, batch.labels.device)


class Labels(BatchRelation):
    """Rows are positives iff they have the same label (supervised SSL)."""

    needs_labels = True

    def __init__(self, normalized: bool = False):
        self.normalized = normalized

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        return relation.Labels(batch.labels.repeat(batch.V), batch.num_classes, self.normalized)


class Neighbors(BatchRelation):
    """As `Views`, and each original with its k nearest by the cosine of their embeddings, the means of their views'.

    With queue = 0 the nearest are sought within the batch, and either side's choice relates the two (Nearest, made symmetric).
    With a queue they are sought among the last `queue` originals of earlier batches, NNCLR's support set (Dwibedi et al. 2021):
    their embeddings then stand beside Z as constants. Until k originals are in the queue, G is that of the views.
    """

    def __init__(self, k: int = 1, queue: int = 0, normalized: bool = False):
        if k < 1 or (queue and queue < k):
            raise ValueError(f"k={k}, queue={queue}: give k >= 1 neighbours, and a queue of 0 or of at least k originals")
        self.k, self.size, self.normalized = k, queue, normalized
        self.queue, self.seen = torch.empty(0), 0  # (size, K) embeddings, the newest overwriting the oldest

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        n = len(batch.labels)
        embeddings = Z.float().reshape(batch.V, n, -1).mean(0)
        G = self.in_queue(embeddings, batch.V) if self.size else self.in_batch(embeddings, batch.V)
        return relation.Normalized(G) if self.normalized else G

    def in_batch(self, embeddings: Tensor, V: int) -> Relation:
        if self.k >= len(embeddings):
            raise Refused(
                f"relation.k={self.k}: a batch of {len(embeddings)} originals has {len(embeddings) - 1} neighbours for each"
            )
        unit = F.normalize(embeddings)
        similarities = (unit @ unit.T).fill_diagonal_(-torch.inf)
        return relation.Originals(relation.Nearest(similarities.topk(self.k).indices), V)

    def in_queue(self, embeddings: Tensor, V: int) -> Relation:
        n = len(embeddings)
        filled = self.queue[: min(self.seen, self.size)].to(embeddings.device)
        if len(filled) >= self.k:
            nearest = (F.normalize(embeddings) @ F.normalize(filled).T).topk(self.k).indices
            G: Relation = relation.Supported(n, V, filled[nearest].flatten(0, 1))
        else:
            G = relation.Views(n, V, device=embeddings.device)
        if not self.seen:
            self.queue = embeddings.new_zeros(self.size, embeddings.shape[1])
        newest = embeddings[-self.size :]
        places = (self.seen + torch.arange(len(newest), device=newest.device)) % self.size
        self.queue = self.queue.to(newest.device).index_copy(0, places, newest)
        self.seen += len(newest)
        return G

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue, self.seen = state["queue"], state["seen"]


class Edges(BatchRelation):
    """As `Views`, and the pairs of originals that a file lists: the relation that it induces on the batch.

    `path` is a CSV with a header and two columns of row numbers, or an npz with arrays i and j. Rows are numbered from 0 in the
    order in which the data set is read: training images, test images, unlabelled images.
    """

    def __init__(self, path: str | None, normalized: bool = False):
        self.path, self.normalized = path, normalized

    def bind(self, labels: Tensor) -> None:
        if self.path is None or not Path(self.path).expanduser().is_file():
            raise Refused(f"relation.path={self.path} is not a file: give a CSV or npz of pairs of row numbers")
        try:
            A = relation.Edges(*read_pairs(Path(self.path).expanduser()), num_rows=len(labels))
        except (ValueError, KeyError, OSError, BadZipFile) as error:
            raise Refused(f"relation.path={self.path}: {' '.join(str(error).split())}") from error
        i, j = A.edges().numpy()
        self.adjacency = scipy.sparse.csr_array((np.ones(len(i), dtype=np.float32), (i, j)), shape=(len(labels),) * 2)

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        rows = batch.rows.numpy()
        induced = self.adjacency[rows][:, rows].tocoo()
        i, j = (torch.from_numpy(side.astype(np.int64)) for side in (induced.row, induced.col))
        A = relation.Edges(i, j, len(rows)).to(batch.labels.device)
        G = relation.Originals(A, batch.V)
        return relation.Normalized(G) if self.normalized else G


def read_pairs(path: Path) -> tuple[Tensor, Tensor]:
    """The two columns of a CSV, or the arrays i and j of an npz: (E,) int64 each. Raises ValueError for anything else."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            sides = [arrays["i"], arrays["j"]]
    else:
        table = pd.read_csv(path)
        if table.shape[1] != 2:
            raise ValueError(f"{table.shape[1]} columns where two are wanted, the row numbers of each pair")
        sides = [table[column].to_numpy() for column in table]
    for side in sides:
        if side.dtype.kind not in "iu":
            raise ValueError(f"row numbers are whole numbers, not {side.dtype}")
    i, j = (torch.from_numpy(side.astype(np.int64)) for side in sides)
    return i, j


class Noisy(BatchRelation):
    """The relation `of` (views or labels) with a share p of its pairs rewired at random, anew in every batch. The draws are made
    on the host from their own seed and continue after a resume."""

    def __init__(self, of: str = "labels", p: float = 0.5, seed: int = 0, normalized: bool = False):
        if of not in ("views", "labels"):
            raise ValueError(f"of={of} is not one of: views, labels")
        self.of, self.p, self.normalized = of, p, normalized
        self.needs_labels = of == "labels"  # type: ignore[misc]
        self.generator = torch.Generator().manual_seed(seed)

    def bind(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        n = len(batch.rows)
        G: Relation = relation.Views(n, batch.V)
        if self.of == "labels":
            G = relation.Labels(self.labels[batch.rows].repeat(batch.V), batch.num_classes)
        rewired = relation.noisy(G, self.p, self.generator).to(batch.labels.device)
        return relation.Normalized(rewired) if self.normalized else rewired

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
