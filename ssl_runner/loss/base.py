"""Base class of the losses: a weighted sum of named terms, computed in float32 or float64."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ssl_runner.distributed import world_size
from ssl_runner.errors import counted
from ssl_runner.relation import Relation


class Loss(nn.Module, ABC):
    """L(Z, G) = sum over the terms of weights[name] * term.

    A subclass sets `weights` and computes its terms in `_terms`.

    In distributed training every rank has the same number of rows. If `supports_sharding` is True, each rank
    calls the loss with its own rows and gets the loss of all rows: `_terms` must all-reduce its sums over the
    rows with `all_reduce_replicated` or `all_reduce_sharded` (`ssl_runner.distributed`). If it is False,
    training gathers all rows before it calls the loss.

    `needs_groups` and `needs_views` restrict the relations: see `check_relation`.

    If `capturable` is True, `_terms` can be recorded in a CUDA graph: fixed shapes, no numbers from the host
    that differ between steps, such as those of a random generator on the host.

    `min_rows` is the smallest number of rows, over all ranks, for which the loss is defined.
    """

    weights: dict[str, float]
    supports_sharding: bool = False
    capturable: bool = False
    min_rows: int = 1
    needs_groups: bool = False  # G consists of groups, such as Views and Labels
    needs_views: bool = False  # the rows are V equal, view-major blocks

    def __init_subclass__(cls) -> None:
        """Reset `supports_sharding` and `capturable`: a subclass that overrides `_terms` must set them."""
        super().__init_subclass__()
        if "_terms" in cls.__dict__:
            cls.supports_sharding = cls.__dict__.get("supports_sharding", False)
            cls.capturable = cls.__dict__.get("capturable", False)

    def forward(self, Z: Tensor, G: Relation) -> Tensor:
        """Z (N, K) embeddings, G a relation over its N rows -> the loss, a scalar.

        Raises ValueError if Z does not have the shape that G expects, or has fewer than `min_rows` rows.
        """
        return self.total(self.terms(Z, G))

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the dict that `terms` returns, a scalar."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        """Z (N, K), G -> the unweighted terms, scalars. Raises ValueError as `forward` does.

        Half precision is converted to float32 and autocast is disabled, because fp16 Gram matrices overflow
        and small covariances underflow. float64 stays float64.
        """
        if Z.ndim != 2 or len(Z) != G.num_rows:
            raise ValueError(
                f"Z.shape={tuple(Z.shape)}: expected ({G.num_rows}, K); give one embedding per row of G"
            )
        self.check_rows(len(Z) * (world_size() if self.supports_sharding else 1), Z.shape[1], G.V)
        self.check_relation(G)
        with torch.autocast(Z.device.type, enabled=False):
            return self._terms(Z.float() if Z.dtype in (torch.float16, torch.bfloat16) else Z, G)

    def check_rows(self, N: int, K: int, V: int | None) -> None:
        """Raise ValueError if the loss is not defined for Z (N, K), the rows of all ranks, with V as G.V."""
        if self.min_rows > N:
            raise ValueError(
                f"{counted(N, 'row')}: expected at least {self.min_rows} for {type(self).__name__}; give"
                " more embeddings"
            )

    def check_relation(self, G: Relation) -> None:
        """Raise ValueError if the loss is not defined for G. Causes no host-device sync."""
        name = type(self).__name__
        if self.needs_groups and G.groups is None:
            raise ValueError(
                f"G={type(G).__name__}: expected a relation whose positives form groups, for {name} with"
                " these options; use relation=views or relation=labels"
            )
        if self.needs_views and G.V is None:
            raise ValueError(
                f"G={type(G).__name__}: expected a relation of views, for {name} with these options;"
                " use relation=views"
            )

    @abstractmethod
    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        """Z (N, K) in float32 or float64, G -> the unweighted terms, scalars."""


def off_diagonal(C: Tensor) -> Tensor:
    """C (K, K) with its diagonal set to zero.

    Subtracting the diagonal from a sum over all entries instead would lose small off-diagonal entries to
    rounding.
    """
    return C - C.diagonal().diag()
