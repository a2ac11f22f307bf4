"""Diagnostics against direct definitions and embeddings with known values."""

import csv
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.testing import assert_close

from ssl_runner.backbone import Backbone
from ssl_runner.batch import per_size
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.model import SSLModel
from ssl_runner.relation import builders
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.theory import diagnostics, label_free, measures, optima
from ssl_runner.theory.diagnostics import Diagnostics
from ssl_runner.views import Augment
from tests.device import OnDevice, _Event, moved, pretended
from tests.helpers import noise_loader

NOWHERE = Path("/nonexistent")  # a folder that is not written to


def make_diagnostics(
    loss: Loss, relation: RelationBuilder | None = None, num_images: int = 40, folder: Path = NOWHERE
) -> Diagnostics:
    loader, relation = noise_loader(), relation or builders.FromViews()
    relation.bind(loader.data.pretrain.labels)
    return Diagnostics(loader, relation, loss, folder, every=1, num_images=num_images)


def linear_model(K: int = 5) -> SSLModel:
    """Linear network on flattened images; batch norm and dropout make its output depend on the mode."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    return SSLModel(Backbone(body, 8), nn.Linear(8, K))


@pytest.mark.parametrize(
    "loss", [VICReg(), SimCLR(), SpectralContrastive(), BarlowTwins()], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize(
    "relation",
    [
        builders.FromViews(),
        builders.FromLabels(True),
        builders.Rewired(builders.FromLabels()),
        builders.FromNeighbors(2),
    ],
    ids=lambda relation: type(relation).__name__,
)
def test_row_has_every_column_and_is_deterministic(loss: Loss, relation: RelationBuilder) -> None:
    model = linear_model()
    diagnose = make_diagnostics(loss, relation)
    row = diagnose(model, epoch=1, last=False)
    assert tuple(row) == Diagnostics.columns
    again = diagnose(model, epoch=2, last=False)
    assert {k: v for k, v in row.items() if k != "diagnostics_s"} == {
        k: v for k, v in again.items() if k != "diagnostics_s"
    }
    upper = row["optimum_kind"] == "upper bound"
    assert {name for name, value in row.items() if value is None} == ({"loss_gap"} if upper else set())
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert 0 <= row["alignment"] <= 1 + 1e-9
    assert 0 <= row["label_energy"] <= 1 + 1e-9
    assert row["rank"] == 5
    assert row["backbone_rank"] == 8
    if not upper:
        assert row["loss_gap"] == row["subset_loss"] - row["optimum_loss"] > -1e-6


def test_diagnostics_use_eval_mode_and_restore_network() -> None:
    model = linear_model()
    dropout = model.backbone.body[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_diagnostics(VICReg()).evaluate(model, epoch=1)
    assert model.training
    assert model.backbone.training
    assert not dropout.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_diagnostics_leave_order_and_views_of_training_unchanged() -> None:
    (undisturbed, _), *_ = noise_loader().batches(0)
    loader = noise_loader()
    diagnose = Diagnostics(loader, builders.FromViews(), VICReg(), NOWHERE, every=1, num_images=40)
    diagnose.evaluate(linear_model(), epoch=1)
    (X, _), *_ = loader.batches(0)
    assert torch.equal(X, undisturbed)


def test_subset_is_class_balanced() -> None:
    diagnose = make_diagnostics(VICReg(), num_images=41)
    assert sum(map(len, per_size(diagnose.X))) == 2 * len(diagnose.batch.labels)
    counts = torch.bincount(diagnose.batch.labels)
    assert (counts == counts[0]).all()


class Constant(nn.Module):
    """A projector that returns Z regardless of its input."""

    def __init__(self, Z: torch.Tensor) -> None:
        super().__init__()
        self.Z = Z

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.Z


@pytest.mark.parametrize(
    "loss",
    [VICReg(variance="squared", beta=25.0), SimCLR(), SpectralContrastive(), BarlowTwins(eps=1e-12)],
    ids=lambda loss: type(loss).__name__,
)
def test_loss_gap_of_closed_form_optimum_is_zero(loss: Loss) -> None:
    diagnose = make_diagnostics(loss, builders.FromLabels(True))
    G = diagnose.relation(diagnose.batch, torch.zeros(len(diagnose.X), 3))
    model = SSLModel(Backbone(nn.Flatten(), 48), Constant(optima.optimum(loss, G, 3).Z))
    row = diagnose.evaluate(model, epoch=1)
    assert abs(row["loss_gap"]) < 1e-4 * max(1, abs(row["optimum_loss"]))
    assert_close(row["alignment"], 1.0, rtol=0, atol=1e-6)
    assert_close(row["relation_label_energy"], 1.0, rtol=0, atol=1e-6)
    for line in diagnose.spectrum(model)[:2]:
        assert_close(line["Z"], line["closed_form"], rtol=1e-4, atol=1e-4)


def test_finish_writes_singular_values_of_embeddings(tmp_path: Path) -> None:
    """VICReg is invariant to the mean of Z, so the singular values are those of the centred Z."""
    model = linear_model()
    diagnose = make_diagnostics(VICReg(), folder=tmp_path)
    (tmp_path / "spectrum.csv").write_text("left by an interrupted process\n")
    diagnose.finish(model)
    lines = list(csv.DictReader((tmp_path / "spectrum.csv").read_text().splitlines()))
    _, Z = diagnose.embed(model)
    expected = torch.linalg.svdvals((Z - Z.mean(0)).double()) / len(Z) ** 0.5
    assert [line["k"] for line in lines] == ["1", "2", "3", "4", "5"]
    assert_close(torch.tensor([float(line["Z"]) for line in lines]).double(), expected, rtol=1e-4, atol=1e-6)


def test_effective_rank_matches_rankme_definition() -> None:
    sigma = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    p = [s / 4.5 + 1e-7 for s in (3.0, 1.0, 0.5)]
    assert_close(label_free.effective_rank(sigma), math.exp(-sum(q * math.log(q) for q in p)))
    assert_close(label_free.effective_rank(torch.ones(7, dtype=torch.float64)), 7.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "V", "K"), [(40, 2, 5), (12, 5, 7), (6, 2, 30)])
def test_lidar_matches_definition(n: int, V: int, K: int) -> None:
    """The covariances by loops, their quotient and its eigenvalues by SciPy, for views with a large mean."""
    Z = (torch.randn(n, K).repeat(V, 1) + 0.5 * torch.randn(V * n, K) + 7).double()
    images = Z.numpy().reshape(V, n, K).swapaxes(0, 1)
    means = images.mean(1)
    between = sum(np.outer(m, m) for m in means - means.mean(0)) / n
    deviations = [view - mean for views, mean in zip(images, means, strict=True) for view in views]
    within = sum(np.outer(e, e) for e in deviations) / (V * n) + label_free.DELTA * np.eye(K)
    root = np.linalg.inv(scipy.linalg.sqrtm(within))
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    expected = math.exp(-(p * np.log(p)).sum())
    measured = label_free.lidar(*measures.left_singular_vectors(Z - Z.mean(0)), V)
    assert_close(measured, expected, rtol=1e-3, atol=0)


def test_lidar_counts_directions_that_differ_between_images() -> None:
    """Noise within images adds to the rank of the embedding and not to LiDAR; collapsed views are finite."""
    signal, noise = torch.randn(100, 3).repeat(2, 1), torch.randn(200, 6)
    Z = torch.cat([10 * signal, noise], 1)
    axes = measures.left_singular_vectors(Z - Z.mean(0))
    assert len(axes[1]) == 9
    assert_close(label_free.lidar(*axes, 2), 3.0, rtol=0.1, atol=0)
    collapsed = measures.left_singular_vectors(signal - signal.mean(0))
    assert_close(label_free.lidar(*collapsed, 2), 3.0, rtol=0.1, atol=0)
    assert label_free.lidar(*measures.left_singular_vectors(torch.zeros(8, 3)), 2) == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_is_the_exponent_of_a_power_law(alpha: float) -> None:
    """Beyond the 100th eigenvalue the law changes, and the first three are off it: neither is fitted."""
    eigenvalues = torch.arange(1, 201, dtype=torch.float64) ** -alpha
    eigenvalues[:3] *= 10
    eigenvalues[100:] *= 1e-3
    assert_close(label_free.alpha_req(eigenvalues.sqrt()), alpha)
    assert label_free.alpha_req(eigenvalues[:4].sqrt()) is None


def test_alpha_req_matches_weighted_least_squares() -> None:
    values = torch.rand(30, dtype=torch.float64).sort(descending=True).values + 0.1
    ranks = np.arange(4, 31)
    A = np.stack([np.log(ranks), np.ones(27)], 1) / np.sqrt(ranks)[:, None]
    slope = np.linalg.lstsq(A, np.log(values.numpy()[3:] ** 2) / np.sqrt(ranks), rcond=None)[0][0]
    assert_close(label_free.alpha_req(values), -float(slope))


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_off_diagonal_shares_match_matrices_and_duality(shape: tuple[int, int]) -> None:
    Z = torch.randn(shape, dtype=torch.float64)
    covariance, gram = Z.T @ Z, Z @ Z.T
    total = float(covariance.square().sum())
    off = [float((C - C.diagonal().diag()).square().sum()) for C in (covariance, gram)]
    shares = label_free.off_diagonal_shares(Z)
    assert_close(shares, (off[0] / total, off[1] / total))
    columns, rows = (float(Z.norm(dim=axis).pow(4).sum()) for axis in (0, 1))
    assert_close((shares[1] - shares[0]) * total, columns - rows)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_numerical_rank_and_singular_values_match_svd(rank: int, shape: tuple[int, int]) -> None:
    Z = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    values = measures.singular_values(Z)
    assert len(values) == rank == torch.linalg.matrix_rank(Z)
    assert_close(values, torch.linalg.svdvals(Z.double())[:rank], rtol=1e-5, atol=1e-5)
    U, same_values = measures.left_singular_vectors(Z)
    assert_close(same_values, values)
    assert_close(U.T @ U, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(U @ (U.T @ Z.double()), Z.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_zero_matrix_has_no_singular_values(shape: tuple[int, int]) -> None:
    assert len(measures.singular_values(torch.zeros(shape))) == 0


def test_collapse_measures_match_definitions() -> None:
    base = torch.randn(500, 1)
    Z = torch.cat([base, -2 * base, torch.randn(500, 1), torch.zeros(500, 1)], 1)
    expected = sum(abs(float(torch.corrcoef(Z.T)[i, j])) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert_close(diagnostics.mean_correlation(Z), expected, rtol=1e-4, atol=1e-5)
    row = diagnostics.of_embedding(Z, 2, torch.eye(2).repeat(250, 1), None)
    assert row["min_std"] == 0
    assert row["alignment"] is None
    assert diagnostics.mean_correlation(torch.zeros(10, 4)) == 0


def test_loss_without_closed_form_leaves_theory_columns_empty() -> None:
    class Other(Loss):
        def __init__(self) -> None:
            super().__init__()
            self.weights = {"square": 1.0}

        def _terms(self, Z, G):
            return {"square": Z.square().sum()}

    row = make_diagnostics(Other()).evaluate(linear_model(), epoch=1)
    assert tuple(row) == Diagnostics.columns
    assert row["optimum_loss"] is row["alignment"] is row["relation_label_energy"] is None
    assert row["rank"] == 5


def test_neighbours_are_recomputed_at_each_evaluation() -> None:
    model = linear_model()
    diagnose = make_diagnostics(VICReg(), builders.FromNeighbors(2))
    diagnose.evaluate(model, epoch=1)
    first, _ = diagnose.known
    with torch.no_grad():
        model.backbone.body[1].weight.normal_()
    diagnose.evaluate(model, epoch=2)
    second, _ = diagnose.known
    assert (first.dense() != second.dense()).any()


def test_columns_from_device_are_computed_on_the_host_without_a_sync() -> None:
    """On a device `evaluate` returns a function. It gives the columns of the CPU, in another thread as well.

    The emulated device raises on a host-device sync. The embeddings change after the function is returned.
    """
    loader, model = noise_loader(Augment({"all": {}})), linear_model()
    relation = builders.FromNeighbors(2)
    relation.bind(loader.data.pretrain.labels)
    diagnose = Diagnostics(loader, relation, VICReg(), NOWHERE, every=1, num_images=40)
    expected = diagnose.evaluate(model, epoch=1)
    diagnose.X, diagnose.known = [OnDevice(x) for x in per_size(diagnose.X)], None
    moved(model)
    with pretended():
        columns = diagnose.evaluate(model, epoch=1)
        with torch.no_grad():
            model.backbone.body[1].weight.zero_()
    with mock.patch.object(_Event, "synchronize"), ThreadPoolExecutor(1) as thread:
        values = thread.submit(columns).result()
    assert tuple(values) == Diagnostics.columns
    assert {**values, "diagnostics_s": 0} == {**expected, "diagnostics_s": 0}
