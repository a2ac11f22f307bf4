"""The sweep of an experiment: `hydra.sweeper.params` in its file. Does not import torch."""

import argparse
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import compose
from ssl_runner.config.compose import Composer
from ssl_runner.errors import UsageError

SWEEP = ("sweeper", "launcher", "sweep")  # parts of Hydra's configuration that belong to a whole sweep


def open_axes(args: argparse.Namespace) -> list[Override]:
    """Return the axes of the experiment's sweep that the command line does not set to one value.

    An axis may have a single value.
    """
    overrides = compose.parse(args.overrides)
    fixed = {override.key_or_group for override in overrides if not override.is_sweep_override()}
    if "experiment" not in fixed:
        return []
    with compose.composer(args) as composer:
        return [axis for axis in axes(composer, overrides) if axis.key_or_group not in fixed]


def axes(composer: Composer, overrides: list[Override]) -> list[Override]:
    """Return the axes in `hydra.sweeper.params`, which an experiment may set.

    Raises UsageError for a sweep over experiments if one of them sets options of a sweep: Hydra reads these
    before it chooses an experiment.
    """
    lines = [
        str(override.input_line)
        for override in overrides
        if (override.is_hydra_override() or override.key_or_group == "experiment")
        and not override.is_sweep_override()
    ]
    hydra = composer.compose(lines)[1]
    for override in overrides:
        if override.key_or_group == "experiment" and override.is_discrete_sweep():
            for value in override.sweep_string_iterator():
                own = composer.compose([*lines, f"experiment={value}"])[1]
                if changed := [key for key in SWEEP if written(own[key]) != written(hydra[key])]:
                    raise UsageError(
                        f"{override.input_line}: expected experiments that do not set hydra.{changed[0]},"
                        f" which holds for the whole sweep, but {value} does; run experiment={value} alone"
                    )
    return compose.parse(f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items())


def written(node: DictConfig) -> Any:
    """Return the content of a config, with interpolations as they are written."""
    return OmegaConf.to_container(node)
