"""The gamma at which VICReg's optimum drops directions, against a scan of the optimum's rank over gamma."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ssl_runner.facts import limits_of
from ssl_runner.loss import BarlowTwins, VICReg
from ssl_runner.relation import Edges, Labels, Relation, Views
from ssl_runner.relation.builders import FromLabels, FromNeighbors, FromViews
from ssl_runner.theory import optimum, thresholds
from ssl_runner.theory.gamma import describe_gamma, expected_relation, gamma_limits
from ssl_runner.train import Pretraining
from tests.helpers import pretraining
from tests.processes import in_processes

RELATIONS = {
    "views": Views(6, 3),
    "views normalized": Views(6, 3, normalized=True),
    "labels": Labels(torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3])),
    "path": Edges(torch.arange(7), torch.arange(1, 8), 8),
}


def vicreg(gamma: float, variance: str = "squared", alpha: float = 2.0) -> VICReg:
    return VICReg(alpha, 1.0, gamma, variance=variance)


@pytest.mark.parametrize("variance", ["squared", "hinge"])
@pytest.mark.parametrize("G", RELATIONS.values(), ids=RELATIONS)
def test_rank_of_the_optimum_falls_at_each_threshold(G: Relation, variance: str) -> None:
    for K in (3, G.num_rows + 2):
        found = thresholds(vicreg(0.0, variance), G, K)
        assert len(found) == min(K, G.num_rows - 1)
        assert found.equal(found.sort(descending=True).values)
        for gamma in [0.0, *(float(x) * s for x in found[found.isfinite()].unique() for s in (0.999, 1.001))]:
            assert optimum(vicreg(gamma, variance), G, K).rank == int((found > gamma).sum())


def test_threshold_of_views_depends_on_V_also_if_normalized() -> None:
    """alpha N / ((N-1) V/(V-1)): alpha/2 at V = 2 and 7/8 alpha at V = 8. Needs K > n - 1 directions."""
    for V, share in ((2, 0.5), (8, 7 / 8)):
        n = 512 // V
        found = thresholds(vicreg(0.0), Views(n, V, normalized=True), 300)
        assert_close(float(found[-1]), 2.0 * share * 512 / 511)
        assert int(found.isinf().sum()) == n - 1
        assert thresholds(vicreg(0.0), Views(n, V, normalized=True), n - 1).isinf().all()
    assert optimum(vicreg(20.0, alpha=25.0), Views(256, 2, normalized=True), 300).rank == 255
    assert optimum(vicreg(20.0, alpha=25.0), Views(64, 8, normalized=True), 300).rank == 300


def test_hinge_keeps_directions_up_to_25_times_the_threshold_of_the_squared_form() -> None:
    G = Labels(torch.arange(200) % 10, normalized=True)
    squared, hinge = (thresholds(vicreg(0.0, variance, 25.0), G, 64) for variance in ("squared", "hinge"))
    assert_close(hinge, 25 * squared)
    ranks = [
        optimum(vicreg(gamma, form, 25.0), G, 64).rank for form in ("hinge", "squared") for gamma in (30, 500)
    ]
    assert ranks == [64, 64, 9, 9]


def test_thresholds_without_variance_weight_or_eps() -> None:
    """Without a variance term the optimum is 0; the hinge with eps = 0 drops no direction."""
    G = Labels(torch.arange(12) % 3)
    assert thresholds(vicreg(0.0, alpha=0.0), G, 6).eq(0).all()
    assert optimum(vicreg(0.0, alpha=0.0), G, 6).rank == 0
    for gamma in (0.0, 1e3):
        loss = VICReg(2.0, 1.0, gamma, eps=0.0)
        assert thresholds(loss, G, 6).isinf().all()
        assert optimum(loss, G, 6).rank == 6


def limits() -> dict:
    """The limits of a run, from all ranks."""
    training = pretraining(VICReg(), FromLabels())
    return limits_of(
        SimpleNamespace(
            cfg=SimpleNamespace(V=2, batch_size=20),
            data=training.loader.data,
            relation=training.relation,
            loss=training.loss,
            model=training.model,
            solver_class=Pretraining,
        )
    )


def test_limits_of_several_ranks_are_those_of_one_process() -> None:
    assert limits()["rows"] == 40
    assert in_processes(2, limits) == 2 * [limits()]


def test_other_losses_have_no_thresholds() -> None:
    with pytest.raises(NotImplementedError, match="BarlowTwins has no known thresholds"):
        thresholds(BarlowTwins(), Views(4, 2), 3)
    assert gamma_limits(BarlowTwins(), Views(4, 2), 3) is None


def test_expected_relation_has_the_class_shares_of_the_data() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10 + [2] * 60)
    G = expected_relation(FromLabels(), 2, 20, labels[torch.randperm(100)])
    assert torch.bincount(G.y).tolist() == [12, 4, 24]
    assert expected_relation(FromViews(True), 3, 5, labels).square_norm == Views(5, 3, True).square_norm
    assert expected_relation(FromNeighbors(), 2, 20, labels) is None


@pytest.mark.parametrize(
    ("loss", "G", "K", "line"),
    [
        (
            vicreg(0.9),
            Views(8, 2),
            15,
            "gamma=0.9: the optimum uses all 15 directions up to gamma=1.067, and 7 for any gamma",
        ),
        (
            vicreg(1.2),
            Views(8, 2),
            16,
            "warning: gamma=1.2 is beyond 1.067, where the optimum drops directions: it",
        ),
        (vicreg(1.2), Views(8, 2), 7, "gamma=1.2: the optimum uses all 7 directions for any gamma"),
        (
            vicreg(1.2, "hinge"),
            Views(8, 2),
            16,
            "gamma=1.2: the optimum uses all 15 directions up to gamma=26.67",
        ),
    ],
)
def test_line_before_training(loss: VICReg, G: Relation, K: int, line: str) -> None:
    assert describe_gamma(gamma_limits(loss, G, K)).startswith(line)
