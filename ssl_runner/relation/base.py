"""The interface of the builders of a relation."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ssl_runner.batch import Batch
from ssl_runner.relation.operators import Relation


class RelationBuilder(ABC):
    """Builder of the relation over the V n rows of a batch, view-major.

    Call `bind` once, before the first batch. `state_dict` holds everything that is carried over between
    batches and belongs in the checkpoint.
    """

    needs_labels: bool = False
    depends_on_embeddings: bool = False
    uses_memory: bool = False  # uses embeddings of earlier batches (a queue)
    min_batch_size: int = 1  # minimum number of images in a training batch
    shardable: bool = False  # each rank builds the relation of its own rows; otherwise all rows are gathered
    capturable: bool = False  # a call can be recorded in a CUDA graph: fixed shapes, no values of the host
    normalized: bool = False  # the entries of G are divided by sqrt(d_i d_j)
    weighted: bool = False  # the entries of G, before that division, are not only 0 and 1

    def __init_subclass__(cls) -> None:
        """Reset `shardable` and `capturable`: a subclass that overrides `__call__` must set them again."""
        super().__init_subclass__()
        if "__call__" in cls.__dict__:
            cls.shardable = cls.__dict__.get("shardable", False)
            cls.capturable = cls.__dict__.get("capturable", False)

    def bind(self, labels: Tensor) -> None:
        """Prepare for a data set with labels (n,), one per image, on the CPU.

        Raises UsageError if the relation does not fit the data set.
        """

    def check_images(self, indices: Tensor) -> None:
        """Raise UsageError if the relation does not fit the pretraining images with these indices."""

    @abstractmethod
    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        """Build the relation of a batch with embeddings Z (V n, K), which carry no gradient."""

    def frozen_copy(self) -> "RelationBuilder":
        """Return a stateless version: repeated calls on one batch give the same relation."""
        return self

    def count_pairs(self, indices: Tensor) -> int | None:
        """Number of pairs in the file among the images with these indices; None if there is no file."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything carried over between batches, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
