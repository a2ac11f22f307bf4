"""What every loss shares: a weighted sum of named terms, in float32 or better."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ssl_runner.relation import Relation


class Loss(nn.Module, ABC):
    """L(Z, G) = sum of weights[name] * term. A new loss states its `weights` and computes its terms in `_terms`.

    Of several processes each calls a loss with its own rows, as many as the others, and gets the loss of all rows if it
    `reduces`: its sums over rows are then `total` and `pooled` ones (distributed.py). Training gathers all rows for any other.
    """

    weights: dict[str, float]
    reduces: bool = False

    def __init_subclass__(cls) -> None:
        """Terms of its own make no claim that another class has made for others."""
        super().__init_subclass__()
        if "_terms" in cls.__dict__ and "reduces" not in cls.__dict__:
            cls.reduces = False

    def forward(self, Z: Tensor, G: Relation) -> Tensor:
        """Z (N, K) embeddings, G a relation over its N rows -> the loss, a scalar. Raises ValueError when the shapes disagree."""
        return self.total(self.terms(Z, G))

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what `terms` returned, a scalar."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        """Z (N, K), G -> the unweighted terms, scalars. Half precision is promoted and autocast is off: fp16 Gram matrices
        overflow and small covariances vanish. float64 stays float64."""
        if Z.ndim != 2 or len(Z) != G.num_rows:
            raise ValueError(
                f"G relates {G.num_rows} rows and needs Z of shape ({G.num_rows}, K), not {tuple(Z.shape)}"
            )
        with torch.autocast(Z.device.type, enabled=False):
            return self._terms(Z.float() if Z.dtype in (torch.float16, torch.bfloat16) else Z, G)

    @abstractmethod
    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        """Z (N, K) in float32 or float64, G -> the unweighted terms, scalars."""


def off_diagonal(C: Tensor) -> Tensor:
    """C (K, K) with its diagonal set to zero (not subtracted from a sum, where small entries would be lost)."""
    return C - C.diagonal().diag()
