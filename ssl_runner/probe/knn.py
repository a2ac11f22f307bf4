"""k-nearest-neighbour probe, weighted by cosine similarity."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.errors import UsageError
from ssl_runner.probe.protocol import Probe

NEIGHBORS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07  # of the vote weights (Wu et al. 2018)
BLOCK_ELEMENTS = 2**26  # of the cosines of a block of rows with all training rows, 256 MB
BLOCK_ON_CPU = 1024  # rows; larger blocks are not faster


class KnnProbe(Probe):
    """k nearest neighbours by cosine similarity, with vote weights exp(cosine / temperature).

    `neighbors` are the values of k to select from, in ascending order. Those above the number of training
    rows are skipped. Raises UsageError if none is left.
    """

    hyperparameter = "k"

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        classes: int,
        neighbors: Sequence[int] = NEIGHBORS,
        temperature: float = TEMPERATURE,
    ):
        self.X, self.y, self.classes = F.normalize(X), y, classes
        self.neighbors, self.temperature = [k for k in neighbors if 1 <= k <= len(X)], temperature
        if not self.neighbors:
            raise UsageError(
                f"kNN probe: neighbors={list(neighbors)}: expected an integer from 1 to {len(X)}"
            )

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (k, votes (n, classes) for X_eval (n, d)) for each k of `neighbors`."""
        cosines, rows = self.nearest(max(self.neighbors), X_eval)
        for k in self.neighbors:
            yield k, self.votes(cosines[:, :k], rows[:, :k])

    def scores(self, k: float, X_eval: Tensor) -> Tensor:
        """Return the votes (n, classes) of the k nearest training rows for each row of X_eval (n, d)."""
        return self.votes(*self.nearest(int(k), X_eval))

    def nearest(self, k: int, X_eval: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and row indices (n, k) of the nearest training rows, by descending cosine.

        Processes X_eval in blocks of rows, sized by the number of elements of the rows and of their cosines.
        """
        block = max(1, BLOCK_ELEMENTS // max(self.X.shape))
        if X_eval.device.type == "cpu":
            block = min(block, BLOCK_ON_CPU)
        blocks = [(F.normalize(rows) @ self.X.T).topk(k) for rows in X_eval.split(block)]
        return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])

    def votes(self, cosines: Tensor, rows: Tensor) -> Tensor:
        """Sum the vote weights per class: descending cosines and row indices (n, k) -> (n, classes).

        The weights are relative to that of the nearest row, which keeps them finite at low temperatures. A
        class without a vote has -inf, so that it is not ranked.
        """
        weights, labels = ((cosines - cosines[:, :1]) / self.temperature).exp(), self.y[rows]
        votes = weights.new_zeros(len(weights), self.classes).scatter_add_(1, labels, weights)
        voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, labels, True)
        return votes.where(voted, -torch.inf)
