"""Diagnostics of a network on a fixed subset: its ranks, its distance from the closed form, its label energy, its collapse."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_runner import distributed, theory
from ssl_runner.backbone import evaluating
from ssl_runner.dataset import DataSet, balanced_order
from ssl_runner.loss import Loss
from ssl_runner.relate import Batch, BatchRelation
from ssl_runner.relation import Relation
from ssl_runner.theory import Optimum
from ssl_runner.views import Augment

OF_EMBEDDING = ("rank", "effective_rank", "alignment", "label_energy", "min_std", "mean_correlation")
OF_LOSS = ("subset_loss", "loss_floor", "loss_gap", "floor_is", "optimal_rank")
OF_RELATION = ("relation_label_energy", "relation_label_energy_mean")
COLUMNS = (
    *OF_EMBEDDING,
    *OF_LOSS,
    *OF_RELATION,
    *(f"backbone_{name}" for name in OF_EMBEDDING),
    "diagnostics_s",
)
CORRELATED = 1024  # columns, evenly spaced, among which correlations are taken


class Diagnostics:
    """Columns of metrics.csv, computed on V fixed views of some training images, as many of each class, the network in eval mode.

    Of Z (the projector's output), and of the backbone's features with the prefix `backbone_`:

    rank               singular values above max(N, K) roundings of float32, relative to the largest
    effective_rank     exp of the entropy of p_k = sigma_k / sum sigma + 1e-7 (RankMe, Garrido et al. 2023)
    alignment          mean squared cosine of the principal angles to the closed form's subspace
    label_energy       share of the one-hot labels' variance that a linear map explains on these rows; rank / N at random
    min_std            smallest standard deviation of a column
    mean_correlation   mean |correlation| of two columns

    Of the loss and the relation: `subset_loss`, the closed form's `loss_floor` (`floor_is` exact, an upper or a lower bound),
    `loss_gap` between them, `optimal_rank`, and `relation_label_energy`, the share that the closed form's eigenvectors expose
    (the most over tied ones; `..._mean` over all choices). A relation that depends on the embeddings is made anew each time.
    """

    def __init__(
        self,
        data: DataSet,
        augment: Augment,
        relation: BatchRelation,
        loss: Loss,
        *,
        V: int,
        images: int,
        seed: int,
        fixed: bool,
    ):
        classes, device = len(data.classes), data.mean.device
        y = data.train.y.cpu()
        number = min(images, len(y))
        number -= number % classes if number >= classes else 0
        chosen = torch.from_numpy(balanced_order(y.numpy(), seed)[:number])
        [(originals, labels)] = data.train.batches(chosen, number, device)
        self.X = augment(originals, V, data.mean, data.std, torch.Generator(device).manual_seed(seed))
        self.batch = Batch(data.train.rows[chosen], labels, V, classes)
        self.Y = F.one_hot(labels.cpu(), classes).double().repeat(V, 1)
        self.relation, self.loss, self.fixed = relation, loss, fixed
        self.known: tuple[Relation, Optimum | None] | None = None

    @torch.no_grad()
    def embed(self, backbone: nn.Module, projector: nn.Module) -> tuple[Tensor, Tensor]:
        """Features (N, d) and embeddings Z (N, K) of the subset, float32, on the device; every module's mode is put back."""
        with evaluating(backbone, projector):
            rows = distributed.dealt(len(self.X), 512)
            own = self.X[rows[distributed.rank()].to(self.X.device)]
            features = distributed.assembled(
                torch.cat([backbone(x).flatten(1) for x in own.split(512)]).float(), rows
            )
            return features, projector(features).float()

    def optimum(self, Z: Tensor) -> tuple[Relation, Optimum | None]:
        """The relation over the subset and the loss's closed form on it, None for a loss without one."""
        if self.known is None or not self.fixed:
            G = self.relation(self.batch, Z)
            try:
                self.known = G, theory.optimum(self.loss, G, Z.shape[1])
            except NotImplementedError:
                self.known = G, None
        return self.known

    def __call__(self, backbone: nn.Module, projector: nn.Module) -> dict[str, Any]:
        """The columns, for one row of metrics.csv. Several processes share the forward pass; the one that writes gets them."""
        start = time.perf_counter()
        features, Z = self.embed(backbone, projector)
        if not distributed.leads():
            return {}
        with distributed.alone():
            return self.columns(features, Z) | {"diagnostics_s": round(time.perf_counter() - start, 3)}

    def columns(self, features: Tensor, Z: Tensor) -> dict[str, Any]:
        """What there is to say of the features (N, d) and the embeddings Z (N, K) of the subset."""
        G, best = self.optimum(Z)
        with torch.no_grad():
            subset_loss = float(self.loss(Z, G))
        row = of_embedding(Z, self.Y, best)
        most, mean = theory.exposed(self.Y, best) if best else (None, None)
        row |= {
            "subset_loss": subset_loss,
            "loss_floor": best.value if best else None,
            "loss_gap": subset_loss - best.value if best else None,
            "floor_is": best.kind if best else None,
            "optimal_rank": best.rank if best else None,
            "relation_label_energy": most,
            "relation_label_energy_mean": mean,
        }
        return row | {
            f"backbone_{name}": value for name, value in of_embedding(features, self.Y, best).items()
        }

    def spectrum(self, backbone: nn.Module, projector: nn.Module) -> list[dict[str, Any]]:
        """For k = 1 ... K: the singular values of what the loss sees of Z (`Optimum.seen`), and those of the closed form, over
        sqrt(N): the root mean square of a coordinate. Of several processes, in the one that writes."""
        _, Z = self.embed(backbone, projector)
        if not distributed.leads():
            return []
        with distributed.alone():
            _, best = self.optimum(Z)
        seen = best.seen(Z) if best else theory.centred(Z)
        measured = theory.padded(torch.linalg.svdvals(seen), Z.shape[1])
        optimal = best.singular_values if best else [None] * Z.shape[1]
        root = len(Z) ** 0.5
        return [
            {"k": k + 1, "Z": float(z) / root, "closed_form": None if s is None else float(s) / root}
            for k, (z, s) in enumerate(zip(measured, optimal, strict=True))
        ]


def of_embedding(Z: Tensor, Y: Tensor, best: Optimum | None) -> dict[str, Any]:
    """What can be said of an embedding Z (N, K), with one-hot targets Y (N, C), beside the closed form."""
    Z = Z.cpu()
    values = theory.singular_values(Z)
    stds = Z.std(0)
    return {
        "rank": len(values),
        "effective_rank": effective_rank(values),
        "alignment": theory.alignment(Z, best) if best else None,
        "label_energy": theory.label_energy(Z, Y),
        "min_std": float(stds.min()),
        "mean_correlation": mean_correlation(Z),
    }


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of singular values (r,) > 0, as shares of their sum (plus 1e-7, as RankMe has it)."""
    if not len(values):
        return 0.0
    p = values / values.sum() + 1e-7
    return float((-(p * p.log()).sum()).exp())


def mean_correlation(Z: Tensor) -> float:
    """Mean |correlation| over all pairs of different columns of Z (N, K), constant ones left out; 0 with less than two."""
    Z = Z[:, :: max(1, Z.shape[1] // CORRELATED)]
    Z = Z - Z.mean(0)
    norms = Z.norm(dim=0)
    Z = Z[:, norms > 1e-6 * norms.max()] if float(norms.max()) > 0 else Z[:, :0]
    K = Z.shape[1]
    if K < 2:
        return 0.0
    Z = F.normalize(Z, dim=0)
    return float(((Z.T @ Z).abs().sum() - K) / (K * (K - 1)))
