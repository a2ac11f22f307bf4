"""The sweep in a config file (`hydra.sweeper.params`), such as an experiment. Does not import torch."""

import argparse

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from ssl_runner.config import compose, hydra_internals
from ssl_runner.config.compose import Composer

# Groups of compose.CHANGING whose files may set a sweep. The checks do not read Hydra's options in files of
# local and debug.
GROUPS = ("experiment", "hparams_search")


def open_axes(args: argparse.Namespace) -> list[Override]:
    """Return the axes of a chosen file's sweep that the command line does not set to one value.

    An axis may have a single value.
    """
    overrides = compose.parse(args.overrides)
    fixed = {override.key_or_group for override in overrides if not override.is_sweep_override()}
    if not fixed & set(GROUPS):
        return []
    with compose.composer(args) as composer:
        return [axis for axis in axes(composer, overrides) if axis.key_or_group not in fixed]


def axes(composer: Composer, overrides: list[Override]) -> list[Override]:
    """Return the axes in `hydra.sweeper.params`."""
    params = hydra_config(composer, overrides).sweeper.get("params") or {}
    return compose.parse(f"{key}={value}" for key, value in params.items())


def hydra_config(composer: Composer, overrides: list[Override]) -> DictConfig:
    """Return Hydra's own configuration, which the files of GROUPS may set."""
    lines = [
        str(override.input_line)
        for override in overrides
        if (override.is_hydra_override() or override.key_or_group in GROUPS)
        and not override.is_sweep_override()
    ]
    return composer.compose(lines)[1]


def sweep_settings(args: argparse.Namespace) -> tuple[dict[str, str], bool]:
    """Return the environment variables of the jobs, and whether it is a search."""
    with compose.composer(args) as composer:
        hydra = hydra_config(composer, compose.parse(args.overrides))
        return hydra_internals.environment(hydra), hydra.runtime.choices.get("hydra/sweeper") == "optuna"
