"""Diagnostics of the model on a fixed subset: rank, distance from the closed form, label energy, collapse."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner import distributed
from ssl_runner.batch import per_size
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.data.splits import balanced_order, balanced_size
from ssl_runner.device import to_device
from ssl_runner.evaluator import Columns, Evaluator
from ssl_runner.host_copy import HostCopy
from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel, eval_mode
from ssl_runner.relation import Relation
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.runs.files import CsvLog
from ssl_runner.theory import measures
from ssl_runner.theory.label_free import alpha_req, effective_rank, lidar, off_diagonal_shares
from ssl_runner.theory.matrices import centred, padded
from ssl_runner.theory.optima import UPPER, Optimum, optimum

OF_EMBEDDING = (
    *("rank", "effective_rank", "lidar", "alpha_req"),
    *("alignment", "label_energy", "min_std", "mean_correlation"),
)
DUALITY = ("covariance_off_diagonal", "gram_off_diagonal", "duality_difference")
OF_LOSS = ("subset_loss", "optimum_loss", "loss_gap", "optimum_kind", "optimum_rank")
OF_RELATION = ("relation_label_energy", "relation_label_energy_mean")
FORWARD_ROWS = 512  # rows per forward pass
MAX_CORRELATED = 1024  # columns, evenly spaced, whose correlations are averaged


class Diagnostics(Evaluator):
    """Columns of metrics.csv that are computed from a fixed, class-balanced subset of the training images.

    The subset has `num_images` images with V fixed views of each. The model is in eval mode. Only the forward
    passes run on the device. Everything else is computed on the CPU, and in the background unless the device
    is the CPU.

    Of the embeddings Z (N, K), and of the backbone's features with the prefix `backbone_`:

    rank               number of singular values above max(N, K) eps of the largest, eps that of float32
    effective_rank     exp of the entropy of p_k = sigma_k / sum sigma + 1e-7 (RankMe, Garrido et al. 2023)
    lidar              the same of the eigenvalues of linear discriminant analysis, with images as classes and
                       views as their members (Thilak et al. 2023)
    alpha_req          exponent of the decay of the eigenvalues of the covariance (Agrawal et al. 2022)
    alignment          mean squared cosine of the principal angles to the subspace of the closed form
    label_energy       share of the variance of the one-hot labels that a linear map explains on these rows;
                       rank / N at random
    min_std            smallest standard deviation of a column
    mean_correlation   mean |correlation| of two columns

    Of the centred Z alone (Garrido et al. 2022, arXiv:2206.02574):

    covariance_off_diagonal   share of |Z'Z|_F^2 off the diagonal, which non-contrastive losses reduce
    gram_off_diagonal         share of |ZZ'|_F^2 off the diagonal, which contrastive losses reduce
    duality_difference        gram_off_diagonal - covariance_off_diagonal

    Of the loss and the relation on the subset:

    subset_loss                 loss of Z
    optimum_loss, optimum_kind  value of the loss's closed form, and whether it is exact, an upper or a lower
                                bound, or numeric: found by an iteration
    loss_gap                    subset_loss - optimum_loss; empty if that is an upper bound
    optimum_rank                rank of the closed form; empty if it is not known
    relation_label_energy       label energy of the closed form, the highest over the choices within
                                a tied eigenspace
    relation_label_energy_mean  the same, as the mean over these choices

    Columns that need a closed form are empty for a loss without one, those that need its eigenspaces also for
    a bound without them, and columns of labels for a data set without labels. The subset of such a data set
    is drawn from the pretraining images. `finish` writes spectrum.csv to `folder`.
    """

    columns = (
        *OF_EMBEDDING,
        *DUALITY,
        *OF_LOSS,
        *OF_RELATION,
        *(f"backbone_{name}" for name in OF_EMBEDDING),
        "diagnostics_s",
    )

    quick = True

    def __init__(
        self,
        loader: MultiViewLoader,
        relation: RelationBuilder,
        loss: Loss,
        folder: Path,
        *,
        every: int,
        num_images: int,
    ):
        super().__init__(every)
        data, classes = loader.data, len(loader.data.classes)
        images = data.train if classes else data.pretrain
        y = images.y.cpu()
        number = balanced_size(num_images, len(y), classes)
        chosen = torch.from_numpy(balanced_order(y.numpy(), loader.seed)[:number])
        X, batch = loader.fixed_batch(images, chosen)
        self.X = per_size(X)
        self.batch = replace(batch, labels=batch.labels.cpu())
        self.Y: Tensor | None = None  # (N, C)
        if classes:
            self.Y = F.one_hot(self.batch.labels, classes).double().repeat(loader.V, 1)
        self.relation, self.loss, self.folder = relation.frozen_copy(), loss, folder
        # G and the optimum, if they do not depend on Z
        self.known: tuple[Relation, Optimum | None] | None = None

    @torch.no_grad()
    def embed(self, model: SSLModel) -> tuple[Tensor, Tensor]:
        """Features (N, width) and embeddings Z (N, K) of the subset, float32, on the device.

        The rows are sharded over the ranks and all-gathered.
        """
        with eval_mode(model):
            features = torch.cat([self._features(model, X) for X in self.X])
            return features, model.projector(features).float()

    def _features(self, model: SSLModel, X: Tensor) -> Tensor:
        """Features (rows, width) of views X of one size."""
        indices = distributed.shard_indices(len(X), FORWARD_ROWS)
        own = X[to_device(indices[distributed.rank()], X.device)]
        features = torch.cat([model.features(x) for x in own.split(FORWARD_ROWS)]).float()
        return distributed.unshard(features, indices)

    def optimum(self, Z: Tensor, loss: Loss) -> tuple[Relation, Optimum | None]:
        """The relation over the subset and the loss's closed form on it, None for a loss without one.

        Z (N, K) and the loss are on the CPU.
        """
        if self.known is None or self.relation.depends_on_embeddings:
            G = self.relation(self.batch, Z)
            try:
                self.known = G, optimum(loss, G, Z.shape[1])
            except NotImplementedError:
                self.known = G, None
        return self.known

    def evaluate(self, model: SSLModel, epoch: int) -> Columns | Callable[[], Columns]:
        """The columns on the main process; they are empty on other ranks.

        On a device other than the CPU it returns a function that computes the columns on the CPU.
        """
        start = time.perf_counter()
        features, Z = self.embed(model)
        if not distributed.is_main_process():
            return dict.fromkeys(self.columns)
        if Z.device.type == "cpu":  # its cores have no idle time to use
            return self._columns(features, Z, self.loss, time.perf_counter() - start)
        (features, Z), wait_for_copy = HostCopy()([features, Z])
        loss, seconds = deepcopy(self.loss).cpu(), time.perf_counter() - start

        def columns() -> Columns:
            wait_for_copy()
            return self._columns(features, Z, loss, seconds)

        return columns

    @distributed.local_only()
    def _columns(self, features: Tensor, Z: Tensor, loss: Loss, seconds: float) -> Columns:
        """The columns, from tensors on the CPU. `seconds` have already been spent on them."""
        start = time.perf_counter()
        G, best = self.optimum(Z, loss)
        with torch.no_grad():
            subset_loss = float(loss(Z, G))
        V = self.batch.V
        row = of_embedding(Z, V, self.Y, best)
        covariance, gram = off_diagonal_shares(centred(Z))
        row |= dict(zip(DUALITY, (covariance, gram, gram - covariance), strict=True))
        most = mean = None
        if best is not None and self.Y is not None:
            most, mean = measures.label_energy_of_optimum(self.Y, best)
        row |= {
            "subset_loss": subset_loss,
            "optimum_loss": best.value if best else None,
            "loss_gap": subset_loss - best.value if best and best.kind != UPPER else None,
            "optimum_kind": best.kind if best else None,
            "optimum_rank": best.rank if best else None,
            "relation_label_energy": most,
            "relation_label_energy_mean": mean,
        }
        of_backbone = of_embedding(features, V, self.Y, best)
        row |= {f"backbone_{name}": value for name, value in of_backbone.items()}
        return row | {"diagnostics_s": round(seconds + time.perf_counter() - start, 3)}

    def finish(self, model: SSLModel) -> None:
        """Write spectrum.csv: singular values of Z and of the closed form."""
        rows = self.spectrum(model)
        if distributed.is_main_process():
            path = self.folder / "spectrum.csv"
            path.unlink(missing_ok=True)  # of an earlier, interrupted process
            log = CsvLog(path)
            for row in rows:
                log.append(row)

    def spectrum(self, model: SSLModel) -> list[dict[str, Any]]:
        """Rows k = 1 ... K with the k-th singular value of `Optimum.canonicalize(Z)` and of the closed form.

        Both are divided by sqrt(N): the root mean square of a coordinate. Empty on ranks other than the main
        process.
        """
        _, Z = self.embed(model)
        if not distributed.is_main_process():
            return []
        Z = Z.cpu()
        with distributed.local_only():
            _, best = self.optimum(Z, deepcopy(self.loss).cpu())
        canonical = best.canonicalize(Z) if best else centred(Z)
        measured = padded(torch.linalg.svdvals(canonical), Z.shape[1])
        optimal: Any = best.singular_values if best else None
        if optimal is None:
            optimal = [None] * Z.shape[1]
        root = len(Z) ** 0.5
        return [
            {"k": k + 1, "Z": float(z) / root, "closed_form": None if s is None else float(s) / root}
            for k, (z, s) in enumerate(zip(measured, optimal, strict=True))
        ]


def of_embedding(Z: Tensor, V: int, Y: Tensor | None, best: Optimum | None) -> dict[str, Any]:
    """The columns OF_EMBEDDING of Z (N, K), V views of each image with one-hot labels Y (N, C) or None."""
    values = measures.singular_values(Z)
    U, centred_values = measures.left_singular_vectors(centred(Z))
    return {
        "rank": len(values),
        "effective_rank": effective_rank(values),
        "lidar": lidar(U, centred_values, V),
        "alpha_req": alpha_req(centred_values),
        "alignment": measures.alignment(Z, best) if best else None,
        "label_energy": None if Y is None else measures.label_energy(U, Y),
        "min_std": float(Z.std(0).min()),
        "mean_correlation": mean_correlation(Z),
    }


def mean_correlation(Z: Tensor) -> float:
    """Mean |correlation| over all pairs of different columns of Z (N, K).

    Constant columns are left out. 0 for fewer than two columns.
    """
    Z = Z[:, :: max(1, Z.shape[1] // MAX_CORRELATED)]
    Z = Z - Z.mean(0)
    norms = Z.norm(dim=0)
    Z = Z[:, norms > 1e-6 * norms.max()] if float(norms.max()) > 0 else Z[:, :0]
    K = Z.shape[1]
    if K < 2:
        return 0.0
    Z = F.normalize(Z, dim=0)
    return float(((Z.T @ Z).abs().sum() - K) / (K * (K - 1)))
