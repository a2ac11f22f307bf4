"""Composition of configurations with Hydra: from overrides to the configuration of every job.

This module does not import torch, so that `--help` and `--cfg job` stay fast.
"""

import argparse
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_runner.config import hydra_internals, paths, renamed, sweeps
from ssl_runner.config.rules import nearest
from ssl_runner.errors import UsageError, one_line
from ssl_runner.view_layout import view_count

PACKAGE = Path(__file__).parents[1]
# in an installed wheel, conf/ is part of the package; in a checkout, it is next to it
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"

CHANGING = ("local", "experiment", "hparams_search", "debug")  # groups of files that change other options


def register_resolvers() -> None:
    """Register the resolvers of the configs.

    `${unique:}` is eight random hex digits, constant within a run or sweep. `${view_count:}` is the sum of
    count over views.policies. `${divided:a,b}` is the integer part of a / b, and `${times:a,b}` the product.
    """
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("divided", lambda a, b: a // b, replace=True)
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(4), use_cache=True, replace=True)
    OmegaConf.register_new_resolver(
        "view_count", lambda *, _root_: view_count(_root_.views.policies), replace=True
    )


def prefer_our_presets() -> None:
    """Make Hydra use the configs in conf/hydra instead of those of its plugins, and accept choice(null,1)."""
    hydra_internals.allow_null_choices()
    hydra_internals.remove_plugin_schemas(CONF / "hydra")


def parse(lines: Iterable[str]) -> list[Override]:
    """Parse overrides with Hydra. Raises UsageError if one is not <group>=<name> or <key>=<value>."""
    parser, overrides = OverridesParser.create(), []
    for line in lines:
        try:
            overrides.append(parser.parse_override(line))
        except HydraException as error:
            raise paths.refuse(line, error) from error
    for override in overrides:
        if not override.key_or_group:
            raise UsageError(f"{override.input_line} has no key: expected <group>=<name> or <key>=<value>")
    return overrides


def jobs(overrides: list[Override], multirun: bool) -> list[list[Override]]:
    """Return the overrides of each job: one list for a single run, one per combination for a sweep.

    Sampled values cannot be enumerated. They are omitted here and checked when their job starts.
    """
    swept = [override for override in overrides if override.is_sweep_override()]
    if swept and not multirun:
        raise paths.sweep(str(swept[0].input_line))
    found = hydra_internals.enumerate_jobs(
        [override for override in overrides if not sweeps.is_sampled(override)]
    )
    if not found:
        raise UsageError(f"{swept[0].input_line}: expected one or more values to sweep over; give some")
    return [parse(job) for job in found]


class Composer:
    """Compose configurations from the configs of one Hydra search path."""

    def __init__(self, repository: hydra_internals.IConfigRepository, config_name: str):
        self.repository, self.config_name = repository, config_name
        self.composed: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}

    def compose(self, lines: Iterable[str]) -> tuple[DictConfig, DictConfig]:
        """Return the composed configuration of a run, and Hydra's own configuration.

        Raises UsageError if Hydra cannot compose it.
        """
        key = tuple(lines)
        if key in self.composed:  # most jobs of a sweep differ only in values, not in groups
            return self.composed[key]
        try:
            config = compose(self.config_name, overrides=list(key), return_hydra_config=True)
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file).rpartition("/")
            raise UsageError(self.missing(group, choice) if group else one_line(error)) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UsageError(one_line(error.__cause__ or error)) from error
        own = OmegaConf.masked_copy(config, [name for name in map(str, config) if name != "hydra"])
        return self.composed.setdefault(key, (own, config.hydra))

    def missing(self, group: str, choice: str) -> str:
        """Return the error message for a choice that a group does not have.

        Raises UsageError if it is a preset of a plugin that is not installed.
        """
        parents = {"submitit_slurm": "hydra/launcher=slurm", "tpe": "hydra/sweeper=optuna"}
        sweeps.check_plugins([parents.get(choice, ""), f"{group}={choice}"])
        options = self.repository.get_group_options(group)
        options = [option for option in options if f"{group}={option}" not in sweeps.OURS]
        available = ", ".join(options) or "none (add some with --config-dir)"
        return (
            renamed.message(group, choice)
            or f"Unknown {group} '{choice}'.{nearest(choice, options)} Available: {available}"
        )

    def reference(self, chosen: DictConfig, added: set[str]) -> DictConfig:
        """Compose the chosen groups alone, without experiment and single values.

        The result has every option that exists, with its default. `added` are the groups that are not in the
        defaults list of config.yaml.
        """
        lines = [
            f"{'+' if group in added else ''}{group}={choice}"
            for group, choice in ((str(group), choice) for group, choice in chosen.items())
            if choice is not None and group not in CHANGING and not group.startswith("hydra/")
        ]
        local = "local" in chosen and self.repository.config_exists(f"local/{chosen.local}")
        return self.compose([*lines, *(["~local"] if local else [])])[0]

    def options(self, group: str, choice: str) -> list[str]:
        """Return the options in the yaml of a config: top-level keys for a loss, else those of its group."""
        loaded = self.repository.load_config(f"{group}/{choice}")
        content: Any = loaded.config if loaded else {}
        node = content if group == "loss" else content.get(group, content)
        return [key for key in map(str, node) if key not in ("loss", "defaults", "_target_", "name")]

    def owners(self, group: str, option: str) -> list[str]:
        """Return the choices of a group that have this option."""
        choices = self.repository.get_group_options(group)
        return [choice for choice in choices if option in self.options(group, choice)]

    def owners_of_part(self, group: str, name: str) -> list[str]:
        """Return the choices of a group that contain a nested config `name`, as relation=noisy has `base`."""
        return [
            choice
            for choice in self.repository.get_group_options(group)
            if (config := self.repository.load_config(f"{group}/{choice}"))
            and any(item.get_package() == name for item in config.defaults_list or [])
        ]


def find_modules(launch_folder: str | Path, config_dir: str | None) -> None:
    """Append to sys.path the folders of the user's modules: the launch folder, and that of `config_dir`."""
    folders = [launch_folder, *([Path(config_dir).resolve().parent] if config_dir is not None else [])]
    sys.path.extend(str(folder) for folder in folders if str(folder) not in sys.path)


@contextmanager
def composer(args: argparse.Namespace) -> Iterator[Composer]:
    """Context manager that yields a Composer for the search path of the command line.

    The modules that its configs name can be imported from then on.
    Raises UsageError if --config-dir or --config-path is not a folder.
    """
    for option, folder in (("--config-dir", args.config_dir), ("--config-path", args.config_path)):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"{option}={folder}: expected a folder that contains <group>/<name>.yaml")
    find_modules(Path.cwd(), args.config_dir)
    folder = Path(args.config_path or CONF)
    with hydra_internals.config_repository(folder, args.config_dir) as repository:
        yield Composer(repository, args.config_name or "config")
