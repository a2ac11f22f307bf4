"""Diagnostics against direct definitions and embeddings with known values."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import builders
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.theory import diagnostics, measures, optima
from ssl_runner.theory.diagnostics import COLUMNS, Diagnostics
from ssl_runner.views.policy import Augment
from tests.test_dataset import load, toy


def make_diagnostics(
    loss: Loss, relation: RelationBuilder | None = None, images: int = 40, fixed: bool = True
) -> Diagnostics:
    source = toy()
    source.images = torch.randint(
        0, 256, source.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = load(source)
    relation = relation or builders.FromViews()
    relation.bind(data.pretrain.labels)
    augment = Augment({"all": {"crop": {"scale": [0.3, 1.0]}}})
    return Diagnostics(data, augment, relation, loss, V=2, images=images, seed=0, fixed=fixed)


class Network(nn.Module):
    """Linear network on flattened images; batch norm and dropout make its output depend on the mode."""

    def __init__(self, K: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, K), nn.BatchNorm1d(K), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize(
    "loss", [VICReg(), SimCLR(), SpectralContrastive(), BarlowTwins()], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize(
    "relation",
    [builders.FromViews(), builders.FromLabels(True), builders.Rewired(), builders.FromNeighbors(2)],
)
def test_row_has_every_column_and_is_deterministic(loss: Loss, relation: RelationBuilder) -> None:
    network, head = Network(8), nn.Linear(8, 5)
    evaluate = make_diagnostics(loss, relation)
    row = evaluate(network, head)
    assert tuple(row) == COLUMNS
    again = evaluate(network, head)
    assert {k: v for k, v in row.items() if k != "diagnostics_s"} == {
        k: v for k, v in again.items() if k != "diagnostics_s"
    }
    assert all(math.isfinite(value) for name, value in row.items() if name != "floor_kind")
    assert 0 <= row["alignment"] <= 1 + 1e-9
    assert 0 <= row["label_energy"] <= 1 + 1e-9
    assert row["loss_gap"] == row["subset_loss"] - row["loss_floor"]
    assert row["rank"] == 5
    assert row["backbone_rank"] == 8
    if row["floor_kind"] != "upper bound":
        assert row["loss_gap"] > -1e-6


def test_diagnostics_use_eval_mode_and_restore_network() -> None:
    network, head = Network(8), nn.Linear(8, 5)
    network.body[3].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    make_diagnostics(VICReg())(network, head)
    assert network.training
    assert not network.body[3].training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_subset_is_class_balanced() -> None:
    evaluate = make_diagnostics(VICReg(), images=41)
    assert len(evaluate.X) == 2 * len(evaluate.batch.labels)
    counts = torch.bincount(evaluate.batch.labels)
    assert (counts == counts[0]).all()


def test_loss_gap_of_closed_form_optimum_is_zero() -> None:
    """The projector returns the closed-form Z regardless of its input."""

    class Optimum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Z = torch.empty(0)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.Z

    for loss in (
        VICReg(variance="squared", beta=25.0),
        SimCLR(),
        SpectralContrastive(),
        BarlowTwins(eps=1e-12),
    ):
        evaluate = make_diagnostics(loss, builders.FromLabels(True))
        head, flat = Optimum(), nn.Flatten()
        N = len(evaluate.X)
        G = evaluate.relation(evaluate.batch, torch.zeros(N, 3))
        head.Z = optima.optimum(loss, G, 3).Z
        row = evaluate(flat, head)
        assert abs(row["loss_gap"]) < 1e-4 * max(1, abs(row["loss_floor"]))
        assert_close(row["alignment"], 1.0, rtol=0, atol=1e-6)
        assert_close(row["relation_label_energy"], 1.0, rtol=0, atol=1e-6)
        for line in evaluate.spectrum(flat, head)[:2]:
            assert_close(line["Z"], line["closed_form"], rtol=1e-4, atol=1e-4)


def test_effective_rank_matches_rankme_definition() -> None:
    sigma = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    p = [s / 4.5 + 1e-7 for s in (3.0, 1.0, 0.5)]
    assert_close(diagnostics.effective_rank(sigma), math.exp(-sum(q * math.log(q) for q in p)))
    assert_close(diagnostics.effective_rank(torch.ones(7, dtype=torch.float64)), 7.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_numerical_rank_and_singular_values_match_svd(shape: tuple[int, int]) -> None:
    for rank in (1, 3, 8):
        Z = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
        values = measures.singular_values(Z)
        assert len(values) == rank == torch.linalg.matrix_rank(Z)
        assert_close(values, torch.linalg.svdvals(Z.double())[:rank], rtol=1e-5, atol=1e-5)
        U = measures.left_singular_space(Z)
        assert_close(U.T @ U, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
        assert_close(U @ (U.T @ Z.double()), Z.double(), rtol=1e-4, atol=1e-4)
    assert len(measures.singular_values(torch.zeros(shape))) == 0


def test_collapse_measures_match_definitions() -> None:
    base = torch.randn(500, 1)
    Z = torch.cat([base, -2 * base, torch.randn(500, 1), torch.zeros(500, 1)], 1)
    expected = sum(abs(float(torch.corrcoef(Z.T)[i, j])) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert_close(diagnostics.mean_correlation(Z), expected, rtol=1e-4, atol=1e-5)
    row = diagnostics.of_embedding(Z, torch.eye(2).repeat(250, 1), None)
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

    row = make_diagnostics(Other())(Network(8), nn.Linear(8, 5))
    assert tuple(row) == COLUMNS
    assert row["loss_floor"] is row["alignment"] is row["relation_label_energy"] is None
    assert row["rank"] == 5


def test_neighbours_are_recomputed_at_each_evaluation() -> None:
    network, head = Network(8), nn.Linear(8, 5)
    evaluate = make_diagnostics(VICReg(), builders.FromNeighbors(2), fixed=False)
    evaluate(network, head)
    first, _ = evaluate.known
    with torch.no_grad():
        network.body[1].weight.normal_()
    evaluate(network, head)
    second, _ = evaluate.known
    assert (first.dense() != second.dense()).any()
