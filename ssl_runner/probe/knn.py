"""TODO probe.knn"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.probe.protocol import Probe

NEIGHBORS = [1, 5, 10, 20, 50, 100, 200]
TEMPERATURE = 0.07  # of the kNN votes (Wu et al. 2018)


class KnnProbe(Probe):
    """k nearest neighbours by cosine similarity, with vote weights exp(cosine / 0.07) (Wu et al. 2018)."""

    hyperparameter = "k"

    def __init__(self, X: Tensor, y: Tensor, classes: int):
        self.X, self.y, self.classes = F.normalize(X), y, classes

    def path(self, X_eval: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (k, votes (n, classes) for X_eval (n, d)) for each k in NEIGHBORS, in ascending order.

        Skips each k larger than the number of training rows.
        """
        settings = [k for k in NEIGHBORS if k <= len(self.X)]
        cosines, neighbors = self.nearest(settings[-1], X_eval)
        for k in settings:
            yield k, self.votes(cosines[:, :k], neighbors[:, :k])

    def scores(self, k: float, X_eval: Tensor) -> Tensor:
        """Return the votes (n, classes) of the k nearest training rows for each row of X_eval (n, d)."""
        return self.votes(*self.nearest(int(k), X_eval))

    def nearest(self, k: int, X_eval: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
        """Return cosines and row indices (n, k) of the nearest training rows, by descending cosine.

        Processes X_eval in blocks of rows.
        """
        blocks = [(rows @ self.X.T).topk(k) for rows in F.normalize(X_eval).split(block)]
        return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])

    def votes(self, cosines: Tensor, neighbors: Tensor) -> Tensor:
        """Sum the vote weights per class: cosines and row indices (n, k) -> (n, classes)."""
        weights = (cosines / TEMPERATURE).exp()
        return weights.new_zeros(len(weights), self.classes).scatter_add_(1, self.y[neighbors], weights)
