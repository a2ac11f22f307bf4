"""The training of a run on made images, step by step: for measurements of steps on a GPU."""

import itertools
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.gpu_rows import Section
from ssl_runner import build
from ssl_runner.compiler import compile_solver
from ssl_runner.config.compose import CONF, prefer_our_presets, register_resolvers
from ssl_runner.guard import NonFiniteGuard
from ssl_runner.preemption import Preemption
from ssl_runner.step_graph import StepGraph

BATCH = 512  # images per step, each of two views; 16 in a tiny one


class Job:
    """The parts of a run, as `build` makes them, and its steps. `compile` is as the option of `ssl-run`.

    ResNet-18 with `loss=vicreg`, 8,192 made images of `side` pixels; in a tiny job a small convnet.
    """

    def __init__(self, section: Section, *overrides: str, compile: str = "false", side: int = 32):
        cfg = settings(section, f"compile={compile}", f"+dataset.side={side}", *overrides)
        experiment = build.build(cfg)
        self.batch_size = cfg.batch_size
        training: Any = experiment.solver(Preemption(), lambda state, how: None)
        self.compiled = compile_solver(cfg.compile, training, experiment.loader)
        training.model.train()
        self.training, self.guard = training, NonFiniteGuard()
        self.batches = itertools.chain.from_iterable(
            training.loader.batches(epoch, view_format=training.view_format) for epoch in itertools.count()
        )

    def step(self) -> None:
        """One training step, with the loading of its batch and views."""
        self.training._step(*next(self.batches), self.guard)

    def views(self) -> None:
        """Only the loading of a batch and its views."""
        next(self.batches)

    @property
    def mode(self) -> str:
        """What is compiled: off, on or graphs, as `run.json` has it; or that a graph was not recorded."""
        gradients = self.training.gradients
        failed = isinstance(gradients, StepGraph) and gradients.has_syncs
        return f"{self.compiled}, but not recorded" if failed else self.compiled


def settings(section: Section, *overrides: str) -> DictConfig:
    """Compose the configuration of ssl_runner, with options that follow the section's device."""
    register_resolvers()
    prefer_our_presets()
    images = 100 if section.tiny else 8192
    lines = ["dataset=cifar10", "dataset._target_=benchmarks.made.images", f"+dataset.n_train={images}"]
    lines += ["+dataset.n_test=10", "+dataset.n_unlabeled=0", "views=vicreg", f"device={section.device}"]
    lines += [f"batch_size={16 if section.tiny else BATCH}", "epochs=1000"]
    if section.tiny:
        lines += ["backbone=convnet", "backbone.widths=[8,16]", "projector.width=16", "projector.K=8"]
    else:
        lines += ["backbone=resnet18"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*lines, *overrides])
