"""Experiment: the parts of a run, built from its configuration and passed on without copies."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from ssl_runner.build import Experiment, build
from ssl_runner.config.compose import CONF, register_resolvers
from ssl_runner.errors import UsageError
from ssl_runner.loss import Loss
from ssl_runner.preemption import Preemption
from ssl_runner.relation import Relation
from ssl_runner.runs.files import CsvLog
from ssl_runner.theory.solver import ClosedForm
from ssl_runner.train import Pretraining
from tests.helpers import TINY


class PrototypeLoss(Loss):
    def __init__(self, prototypes: int, **options: object) -> None:
        super().__init__()
        self.weights = {"mean": 1.0}
        self.prototypes = nn.Parameter(torch.randn(prototypes))

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return {"mean": (Z.mean() - self.prototypes).square().sum()}


def experiment(overrides: str = "", tiny: str = TINY) -> Experiment:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(compose("config", [*tiny.split(), *overrides.split()]))


def test_parts_are_shared_except_the_relation() -> None:
    """Hydra could copy what it passes on. The state of the relation belongs to the solver alone."""
    built = experiment("relation=neighbors relation.queue=60")
    solver = built.solver(Preemption(), save=lambda state, how: None)
    assert isinstance(solver, Pretraining)
    [diagnostics] = built.evaluators(Path(), CsvLog(None))
    assert solver.model is built.model
    assert solver.loss is diagnostics.loss is built.loss
    assert solver.loader is built.loader
    assert solver.optimizer is built.optimizer
    assert solver.relation is not built.relation
    next(solver.epochs())
    assert solver.relation.seen == 2 * 3 * 50 / 2
    assert built.relation.seen == 0


def test_fresh_backbone_has_the_initial_weights() -> None:
    built = experiment()
    initial = {name: value.clone() for name, value in built.model.backbone.state_dict().items()}
    next(built.solver(Preemption(), save=lambda state, how: None).epochs())
    fresh = built.fresh_backbone().state_dict()
    assert all((fresh[name] == value).all() for name, value in initial.items())
    assert any((value != initial[name]).any() for name, value in built.model.backbone.state_dict().items())


def test_closed_form_has_no_optimizer_and_a_linear_backbone_no_projector() -> None:
    built = experiment("solver=closed_form backbone=linear", "dataset.subset=200 batch_size=50 device=cpu")
    assert built.optimizer is None
    assert built.precision == "fp32"
    assert not list(built.model.projector.parameters())
    assert isinstance(built.solver(Preemption(), save=lambda state, how: None), ClosedForm)


@pytest.mark.parametrize(("settings", "number"), [("", 1), ("diagnostics.every=0", 0), ("probe.every=1", 2)])
def test_evaluators_with_a_period_are_built(settings: str, number: int) -> None:
    assert len(experiment(settings).evaluators(Path(), CsvLog(None))) == number


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("optimizer=sgd +optimizer.nonsense=1", "optimizer.nonsense: expected an option of the chosen"),
        (
            "solver=closed_form projector=linear +loss.prototypes=3"
            " loss._target_=tests.test_build.PrototypeLoss",
            "PrototypeLoss has no closed form for a linear model",
        ),
        ("solver=closed_form projector=linear relation=neighbors relation.queue=60", "set relation.queue=0"),
        ("solver=closed_form projector=linear loss=wmse", "unit_rows=true: expected false"),
        (
            "solver=closed_form projector=linear loss=wmse unit_rows=false whitening_size=20",
            "whitening_size=20: expected null",
        ),
    ],
)
def test_unusable_parts_are_refused_before_the_data_set_is_read(settings: str, message: str) -> None:
    missing = "dataset=stl10 dataset.root=/nonexistent epochs=1 batch_size=50 device=cpu"
    with pytest.raises(UsageError, match=message):
        experiment(settings, missing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "loss=mmcr relation=neighbors",
            "relation: G=ViewExpanded: expected a relation whose positives",
        ),
        ("loss=simclr denominator=negatives relation=noisy", "relation: G=Edges: expected a relation whose"),
        (
            "loss=simclr denominator=negatives batch_size=1",
            "batch_size=1: expected 2 or more",
        ),
        ("loss=mmcr alpha=1 relation=labels", "relation: G=Labels: expected a relation of views, for MMCR"),
        ("loss=frossl per_view=true relation=labels", "relation: G=Labels: expected a relation of views"),
        (
            "loss=frossl per_view=true relation=neighbors relation.queue=60",
            "relation.queue=60: expected 0 for this loss",
        ),
        ("loss=wmse projector.K=100", "batch_size=50: K=100: expected less than the 100 rows"),
        ("loss=wmse projector.K=40 whitening_size=25", "batch_size=50: K=40: expected less than the 25 rows"),
        (
            "loss=wmse projector.K=35 whitening_size=30 relation=neighbors relation.queue=60",
            "batch_size=50: K=35: expected less than the 30 rows",
        ),
        (
            "loss=wmse projector.K=64 diagnostics.num_images=30",
            "num_images=30: K=64: expected less than the 60",
        ),
    ],
)
def test_loss_that_is_not_defined_for_the_relation_is_refused(settings: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        experiment(settings)


def test_rows_to_whiten_are_compared_with_the_features_without_a_projector() -> None:
    with pytest.raises(UsageError, match="batch_size=50: K=100: expected less than the 100 rows"):
        experiment(
            "loss=wmse projector=identity backbone.widths=[8,100]",
            "dataset.subset=200 batch_size=50 device=cpu",
        )


@pytest.mark.parametrize(
    "settings",
    [
        "loss=mmcr relation=labels",
        "loss=frossl per_view=true relation=neighbors",
        "loss=mmcr alpha=1 V=3",
        "loss=wmse projector.K=99",
        "loss=wmse projector.K=49 whitening_size=26 diagnostics.every=0",  # one block of each view's 50 rows
        "loss=wmse projector.K=60 whitening_size=80 relation=labels",  # one block of all 100 rows
        "loss=wmse projector.K=64 diagnostics.num_images=30 diagnostics.every=0",
    ],
)
def test_loss_that_is_defined_for_the_relation_is_accepted(settings: str) -> None:
    experiment(settings)


def test_random_initial_parameters_of_a_loss_depend_on_the_seed_only() -> None:
    """The global generator has another state in every run of a sweep."""
    custom = "+loss.prototypes=3 loss._target_=tests.test_build.PrototypeLoss"
    first, again, other = (
        experiment(f"{custom} seed={seed}").loss.state_dict()["prototypes"] for seed in (0, 0, 1)
    )
    assert first.equal(again)
    assert not first.equal(other)
