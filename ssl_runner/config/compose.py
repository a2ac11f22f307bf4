"""Validate the command line before any run starts: options, types and ranges, for every job of a sweep.

This module does not import torch, so that `--help` and `--cfg job` stay fast.
"""

import argparse
import difflib
import secrets
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_runner.config.rules import LOSS_RULES, RULES, Rule, check_values, format_value, one_line
from ssl_runner.errors import UsageError

PACKAGE = Path(__file__).parents[1]
CONF = (
    PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
)  # installed from a wheel, or a checkout
PLUGINS = {  # override -> Hydra plugin, and the extra of this package that installs it
    "hydra/launcher=slurm": ("submitit_launcher", "slurm"),
    "hydra/launcher=joblib": ("joblib_launcher", "sweep"),
    "hydra/sweeper=optuna": ("optuna_sweeper", "sweep"),
}


def register_resolvers() -> None:
    """Register `${unique:}`: eight random hex digits, constant within a run or sweep."""
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(4), use_cache=True, replace=True)


def prefer_our_presets() -> None:
    """Remove plugin configs from Hydra's ConfigStore if conf/hydra has a config of the same name.

    Otherwise Hydra would validate the files in conf/hydra against the plugins' schemas and fail.
    """
    Plugins.instance()  # imports the plugins, which fill the ConfigStore
    for file in (CONF / "hydra").glob("*/*.yaml"):
        ConfigStore.instance().repo.get("hydra", {}).get(file.parent.name, {}).pop(file.name, None)


def check_plugins(overrides: Iterable[Override]) -> None:
    """Raise UsageError if the plugin of the chosen launcher or sweeper is not installed."""
    for override in overrides:
        plugin, extra = PLUGINS.get(str(override.input_line), ("", ""))
        if plugin and find_spec(f"hydra_plugins.hydra_{plugin}") is None:
            raise UsageError(
                f"{override.input_line}: expected hydra-{plugin.replace('_', '-')} to be installed;"
                f" run pip install 'ssl_runner[{extra}]'"
            )


def check(args: argparse.Namespace) -> list[tuple[str, DictConfig]]:
    """Compose and validate every job of the command line.

    Returns one pair per job: its overrides as written, and its configuration. Raises UsageError, with a
    one-line message, for the first job that cannot run.
    """
    for folder in (args.config_dir, args.config_path):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(
                f"{folder} is not a folder: --config-dir expects a folder that contains <group>/<name>.yaml"
            )
    search_path = create_config_search_path(str(Path(args.config_path or CONF).resolve()))
    if args.config_dir:
        query = SearchPathQuery(provider="schema")  # the position that Hydra gives it
        search_path.prepend("command-line", f"file://{Path(args.config_dir).resolve()}", anchor=query)
    Hydra.create_main_hydra2(task_name="check", config_search_path=search_path)
    try:
        composer = Composer(args.config_name or "config")
        all_jobs = jobs(args.overrides, args.multirun)
        return [
            (" ".join(str(o.input_line) for o in overrides), composer.check(overrides))
            for overrides in all_jobs
        ]
    finally:
        GlobalHydra.instance().clear()


def jobs(lines: list[str], multirun: bool) -> list[list[Override]]:
    """Return the overrides of each job: one list for a single run, one per combination for a sweep.

    Continuous ranges that a search algorithm samples from (such as `interval`) cannot be enumerated. They are
    omitted here and checked when their job starts.
    """
    overrides = parse(lines)
    swept = [override for override in overrides if override.is_sweep_override()]
    if swept and not (multirun or "hydra.mode=MULTIRUN" in lines):
        raise UsageError(
            f"{swept[0].input_line} is a sweep: add -m for one run per value, or write a list as [a,b]"
        )
    finite = [
        override for override in overrides if not override.is_sweep_override() or override.is_discrete_sweep()
    ]
    batches = BasicSweeper.split_arguments(finite, max_batch_size=None)
    if not batches or not batches[0]:
        raise UsageError(f"{swept[0].input_line} is an empty sweep: give at least one value")
    return [parse(list(job)) for job in batches[0]]


def parse(lines: list[str]) -> list[Override]:
    """Parse overrides with Hydra. Raises UsageError if one is not <group>=<name> or <key>=<value>."""
    try:
        overrides = OverridesParser.create().parse_overrides(lines)
    except HydraException as error:
        message = one_line(error).split(" See https")[0]
        raise UsageError(f"{message}: expected <group>=<name> or <key>=<value>") from error
    for override in overrides:
        if not override.key_or_group:
            raise UsageError(f"{override.input_line} has no key: expected <group>=<name> or <key>=<value>")
    return overrides


class Composer:
    """Compose and validate configurations from one Hydra search path."""

    def __init__(self, config_name: str):
        self.config_name = config_name
        self.repository = GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]
        self.composed: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}

    def compose(self, lines: Iterable[str]) -> tuple[DictConfig, DictConfig]:
        """Return the composed configuration, and the chosen config of each group.

        Raises UsageError if Hydra cannot compose it.
        """
        key = tuple(lines)
        if key in self.composed:  # most jobs of a sweep differ only in values, not in groups
            return self.composed[key]
        try:
            config = compose(self.config_name, overrides=list(key), return_hydra_config=True)
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file).rpartition("/")
            if not group:
                raise UsageError(one_line(error)) from error
            options = self.repository.get_group_options(group)
            available = ", ".join(options) or "none (add some with --config-dir)"
            raise UsageError(
                f"Unknown {group} '{choice}'.{nearest(choice, options)} Available: {available}"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UsageError(one_line(error.__cause__ or error)) from error
        own = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
        return self.composed.setdefault(key, (own, config.hydra.runtime.choices))

    def check(self, overrides: list[Override]) -> DictConfig:
        """Return the configuration of the job with these overrides. Raises UsageError if it cannot run."""
        task_overrides = [
            override for override in overrides if not override.key_or_group.startswith(("hydra.", "hydra/"))
        ]
        groups = [
            override for override in task_overrides if self.repository.group_exists(override.key_or_group)
        ]
        for override in groups:
            self.check_choice(override)
        _, chosen = self.compose(str(override.input_line) for override in groups)
        reference = self.reference(
            chosen, {override.key_or_group for override in groups if override.is_add()}
        )
        for override in task_overrides:
            if override not in groups:
                self.check_key(override, reference, chosen)
        config, _ = self.compose(str(override.input_line) for override in task_overrides)
        for key in map(str, config):
            if key == "experiment":
                raise UsageError(
                    f"experiment={chosen.experiment}: expected '# @package _global_' as the first line of"
                    " its file; add it"
                )
            if key not in reference:
                raise UsageError(self.unknown(key, reference, chosen))
        check_tree(config, reference)
        check_values(config)
        if (
            config.solver._target_.endswith(".ClosedForm")
            and config.backbone._target_ == "ssl_runner.backbone.linear"
        ):
            self.check_only_matrix(config, task_overrides)
        if config.resume not in (None, "auto") and not any(
            override.key_or_group == "resume" for override in task_overrides
        ):
            raise UsageError(
                f"resume={config.resume} is set in a config file: expected on the command line; move it there"
            )
        return config

    def check_only_matrix(self, config: DictConfig, overrides: list[Override]) -> None:
        """Raise UsageError for projector options or initial weights if the solver fits the backbone."""
        solved = "solver=closed_form backbone=linear fits the backbone itself"
        for override in overrides:
            if override.key_or_group.startswith("projector") and not config.projector._target_.endswith(
                ".identity"
            ):
                raise UsageError(
                    f"{override.input_line}: {solved} and has no projector; leave it out and set K with"
                    " backbone.width"
                )
        if config.init_weights is not None:
            raise UsageError(
                f"init_weights={config.init_weights}: {solved} and uses no initial weights; leave it out"
            )

    def check_choice(self, override: Override) -> None:
        """Raise UsageError if an override of a group does not name exactly one of its configs."""
        group, options = override.key_or_group, self.repository.get_group_options(override.key_or_group)
        one_choice = isinstance(override.value(), str) and not override.is_delete()
        if not one_choice and not (group == "experiment" and override.value() is None):
            available = ", ".join(options) or "(none yet)"
            raise UsageError(f"{override.input_line}: expected {group}=<name>; use one of {available}")
        if override.is_add() and group == "experiment":
            raise UsageError(f"{override.input_line}: expected no +; write experiment={override.value()}")

    def reference(self, chosen: DictConfig, added: set[str]) -> DictConfig:
        """Compose the chosen groups alone, without experiment and single values.

        The result has every option that exists, with its default.
        """
        lines = tuple(
            f"{'+' if group in added else ''}{group}={choice}"
            for group, choice in ((str(group), choice) for group, choice in chosen.items())
            if choice is not None and group != "experiment" and not group.startswith("hydra/")
        )
        return self.compose(lines)[0]

    def check_key(self, override: Override, reference: DictConfig, chosen: DictConfig) -> None:
        """Raise UsageError for a key that the chosen groups do not have.

        New arguments may be added with `+` at any level below a `_target_`.
        """
        key = override.key_or_group
        node: Any = reference
        known, open_ended = True, False
        for name in key.split("."):
            if known and isinstance(node, DictConfig) and name in node:
                parent, node = node, node[name]
            else:
                known, node = False, None
            open_ended = open_ended or (isinstance(node, DictConfig) and "_target_" in node)
        if (
            known
            and key.startswith("loss.")
            and OmegaConf.is_interpolation(parent, name)
            and name in reference
        ):
            raise UsageError(
                f"{override.input_line}: options of a loss are set at the top level; write"
                f" {name}={override.get_value_element_as_str()}"
            )
        if override.is_add() and known:
            raise UsageError(
                f"{override.input_line}: {key} exists already; write {str(override.input_line).lstrip('+')}"
            )
        if override.is_delete() and known:
            raise UsageError(
                f"{override.input_line}: {key} cannot be removed; set another value, or null if allowed"
            )
        if not known and not (override.is_add() and open_ended):
            raise UsageError(
                self.unknown(key, reference, chosen, str(override.input_line) if open_ended else None)
            )

    def unknown(
        self, key: str, reference: DictConfig, chosen: DictConfig, argument: str | None = None
    ) -> str:
        """Return the error message for an unknown key.

        It names the configs that have this option, or the closest existing option. `argument` is the override
        as written if the key could be added as a new argument.
        """
        group, _, name = key.rpartition(".")
        group = group or "loss"  # options of a loss are at the top level
        if self.repository.group_exists(group):
            settings = {
                choice: self.settings(group, choice) for choice in self.repository.get_group_options(group)
            }
            owners = [f"{group}={choice}" for choice, names in settings.items() if name in names]
            if owners:
                choice = chosen[group]
                own = ", ".join(settings.get(choice, [])) or "none"
                return (
                    f"{key} is an option of {' and '.join(owners)}, not of {group}={choice} (options: {own})"
                )
        keys = [*dotted_keys(reference), *map(str, reference)]
        add = f". Add it as a new argument: +{argument}" if argument else ""
        return f"Unknown option '{key}'.{nearest(key, keys)} List all: ssl-run --cfg job{add}"

    def settings(self, group: str, choice: str) -> list[str]:
        """Return the options in the yaml of a config: top-level keys for a loss, else those of its group."""
        content = self.repository.load_config(f"{group}/{choice}").config
        node = content if group == "loss" else content.get(group, content)
        return [key for key in map(str, node) if key not in ("loss", "defaults", "_target_", "name")]


def check_tree(config: DictConfig, reference: DictConfig, path: str = "", open_ended: bool = False) -> None:
    """Raise UsageError for unknown keys, and for values whose type differs from that of the default.

    `reference` holds the defaults. Unknown keys are allowed below a `_target_`, as arguments.
    """
    open_ended = open_ended or "_target_" in reference
    for name in map(str, config):
        key = f"{path}{name}"
        if name not in reference:
            if path and not open_ended:
                raise UsageError(
                    f"Unknown option '{key}'.{nearest(name, map(str, reference), path)}"
                    " List all: ssl-run --cfg job"
                )
            continue
        value, default = config[name], reference[name]
        if isinstance(default, DictConfig):
            if not isinstance(value, DictConfig):
                raise UsageError(
                    f"{key}={value}: expected a group of options ({', '.join(map(str, default))});"
                    " set these instead"
                )
            if value.get("_target_") == default.get("_target_"):
                check_tree(value, default, f"{key}.", open_ended)
        elif (
            key not in RULES
            and key not in LOSS_RULES
            and default is not None
            and not OmegaConf.is_interpolation(reference, name)
        ):
            rule = Rule(type(default)) if type(default) in (int, float, bool, str) else None
            if (rule and not rule.accepts(value)) or (
                isinstance(default, ListConfig) and not isinstance(value, ListConfig)
            ):
                raise UsageError(f"{key}={format_value(value)}: expected {rule or 'a list'}")


def dotted_keys(config: DictConfig, path: str = "") -> Iterator[str]:
    """Yield the dotted names of all values below a node."""
    for name in map(str, config):
        value = None if OmegaConf.is_missing(config, name) else config[name]
        if isinstance(value, DictConfig):
            yield from dotted_keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def nearest(given: str, accepted: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean '...'?" with the closest accepted name after `prefix`, or "" if none is close."""
    accepted = list(accepted)
    tails = [name for name in accepted if name.rpartition(".")[2] == given]  # lr stands for optimizer.lr
    near = tails or difflib.get_close_matches(given, accepted, n=1)
    return f" Did you mean '{prefix}{near[0]}'?" if near else ""
