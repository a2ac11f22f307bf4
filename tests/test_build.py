"""Experiment: the parts of a run, built from its configuration and passed on without copies."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ssl_runner.build import Experiment, build
from ssl_runner.config.compose import CONF, register_resolvers
from ssl_runner.preemption import Preemption
from ssl_runner.runs.files import CsvLog
from ssl_runner.theory.solver import ClosedForm
from ssl_runner.train import Pretraining
from tests.helpers import TINY


def experiment(overrides: str = "", tiny: str = TINY) -> Experiment:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(compose("config", [*tiny.split(), *overrides.split()]))


def test_parts_are_shared_except_the_relation() -> None:
    """Hydra could copy what it passes on. The state of the relation belongs to the solver alone."""
    built = experiment("relation=neighbors relation.queue=60")
    solver = built.solver(Preemption(), save=lambda state: None)
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
    next(built.solver(Preemption(), save=lambda state: None).epochs())
    fresh = built.fresh_backbone().state_dict()
    assert all((fresh[name] == value).all() for name, value in initial.items())
    assert any((value != initial[name]).any() for name, value in built.model.backbone.state_dict().items())


def test_closed_form_has_no_optimizer_and_a_linear_backbone_no_projector() -> None:
    built = experiment("solver=closed_form backbone=linear", "dataset.subset=200 batch_size=50 device=cpu")
    assert built.optimizer is None
    assert built.precision == "fp32"
    assert not list(built.model.projector.parameters())
    assert isinstance(built.solver(Preemption(), save=lambda state: None), ClosedForm)


@pytest.mark.parametrize(("settings", "number"), [("", 1), ("diagnostics.every=0", 0), ("probe.every=1", 2)])
def test_evaluators_with_a_period_are_built(settings: str, number: int) -> None:
    assert len(experiment(settings).evaluators(Path(), CsvLog(None))) == number
