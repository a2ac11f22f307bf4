"""Validation of the command line before any run starts: options, types and ranges, for every job of a sweep.

This module does not import torch. Checks that need data or libraries are in `ssl_runner.build`.
"""

import argparse
from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from ssl_runner.config import compose, grid, renamed, sweeps
from ssl_runner.config.compose import Composer
from ssl_runner.config.rules import LOSS_RULES, RULES, check_values, dotted_keys, format_value, nearest
from ssl_runner.config.training import check_training
from ssl_runner.errors import UsageError, listed
from ssl_runner.rule import Rule

OPEN_MAPS = ("evaluators", "probe.classifiers")  # name -> {_target_: ...}, to which users add entries


def check(args: argparse.Namespace, evaluation: bool = False) -> list[tuple[str, DictConfig]]:
    """Compose and validate every job of the command line.

    Returns one pair per job: the overrides that the sweep sets, or all of a single run, and its
    configuration. `evaluation`: the job evaluates a finished run. Raises UsageError, with a one-line message,
    for the first job that cannot run.
    """
    overrides = compose.parse(args.overrides)
    with compose.composer(args) as composer:
        axes = []
        if args.multirun:
            axes = grid.axes(composer, overrides)
            hydra = grid.hydra_config(composer, overrides)
            sweeps.check_sweep(hydra, [*axes, *overrides])
            for override in overrides:
                if override.key_or_group in grid.GROUPS and override.is_sweep_override():
                    for job in compose.jobs([override], multirun=True):
                        sweeps.check_ignored(job[0], grid.hydra_config(composer, job), hydra)
        everything = [*axes, *overrides]
        try:
            return [
                (sweeps.names(job, everything), check_job(composer, job, evaluation))
                for job in compose.jobs(everything, args.multirun)
            ]
        except UsageError as error:
            keys = {axis.key_or_group for axis in axes} - {override.key_or_group for override in overrides}
            if not str(error).startswith(tuple(keys)):
                raise
            raise UsageError(f"{error} (from hydra.sweeper.params)") from error


def check_job(composer: Composer, overrides: list[Override], evaluation: bool = False) -> DictConfig:
    """Return the configuration of the job with these overrides. Raises UsageError if it cannot run."""
    task = [override for override in overrides if not override.is_hydra_override()]
    for override in overrides:
        if override.key_or_group == "hydra.output_subdir" and override.value() is not None:
            raise UsageError(
                f"{override.input_line}: expected null, because a run writes .hydra/ itself; leave it out"
            )
    groups = [override for override in task if composer.repository.group_exists(override.key_or_group)]
    chosen = check_groups(composer, groups)
    reference = composer.reference(chosen, {key_of(override) for override in groups if override.is_add()})
    for override in task:
        if override not in groups:
            check_key(composer, override, reference, chosen)
    config, _ = composer.compose(str(override.input_line) for override in task)
    for key in map(str, config):
        if key in compose.CHANGING:
            raise UsageError(
                f"{key}={chosen[key]}: expected '# @package _global_' as the first line of its file; add it"
            )
        if key not in reference:
            raise UsageError(unknown(composer, key, config[key], reference, chosen))
    check_tree(config, reference)
    try:
        check_values(config, evaluation)
        if not evaluation:
            check_training(config)
    except (ConfigKeyError, ConfigAttributeError) as error:  # in a config of the user's
        group = str(error.full_key).partition(".")[0]
        raise UsageError(
            f"{group}={chosen.get(group)}: expected a value of {error.full_key}; add it to its file"
        ) from error
    check_logger(config)
    if (
        config.solver._target_.endswith(".ClosedForm")
        and config.backbone._target_ == "ssl_runner.backbone.linear"
    ):
        check_solved_backbone(config, task)
    if config.resume not in (None, "auto") and not any(o.key_or_group == "resume" for o in task):
        raise UsageError(
            f"resume={config.resume} is set in a config file: expected on the command line; move it there"
        )
    return config


def key_of(override: Override) -> str:
    """Return the key of an override without its + or ~: `relation`, or `relation@relation.base`."""
    return override.get_key_element().lstrip("+~")


def check_groups(composer: Composer, groups: list[Override]) -> DictConfig:
    """Return the chosen config of each group. Raises UsageError for overrides of groups that are invalid."""
    for override in groups:
        check_choice(composer, override)
    lines: list[str] = []
    chosen: DictConfig | None = None
    for override in sorted(groups, key=lambda override: override.package or ""):  # outer packages first
        if override.package is not None and not override.is_add():
            chosen = composer.compose(lines)[1].runtime.choices
            if key_of(override) not in chosen:
                raise UsageError(f"{override.input_line}: {missing_part(composer, override.package, chosen)}")
        lines.append(str(override.input_line))
    return composer.compose(lines)[1].runtime.choices


def check_choice(composer: Composer, override: Override) -> None:
    """Raise UsageError if an override of a group does not name exactly one of its configs."""
    group, value = override.key_or_group, override.value()
    options = composer.repository.get_group_options(group)
    one_choice = isinstance(value, str) and not override.is_delete()
    if not one_choice:
        available = ", ".join(options) or "(none yet)"
        raise UsageError(f"{override.input_line}: expected {key_of(override)}=<name>; use one of {available}")
    if group == "local" and value not in options:  # Hydra ignores an optional file that is missing
        raise UsageError(composer.missing(group, str(value)))


def missing_part(composer: Composer, path: str, chosen: DictConfig) -> str:
    """Return the error message for a nested config, such as relation.base, that no chosen config has."""
    group, _, name = path.rpartition(".")
    owners = composer.owners_of_part(group, name)
    use = [f"{group}={choice}" for choice in owners]
    return f"{group}={chosen.get(group)} has no '{name}'" + (
        f"; it belongs to {listed(use, 'or')}" if use else ""
    )


def check_key(composer: Composer, override: Override, reference: DictConfig, chosen: DictConfig) -> None:
    """Raise UsageError for a key that the chosen groups do not have.

    New arguments may be added with `+` at any level below a `_target_`, and new entries in OPEN_MAPS.
    """
    key, line = override.key_or_group, str(override.input_line)
    node: Any = reference
    known, open_ended = True, key.startswith(tuple(f"{name}." for name in OPEN_MAPS))
    for name in key.split("."):
        if known and isinstance(node, DictConfig) and name in node:
            parent, node = node, node[name]
        else:
            known, node = False, None
        open_ended = open_ended or (isinstance(node, DictConfig) and "_target_" in node)
    if known and key.startswith("loss.") and OmegaConf.is_interpolation(parent, name) and name in reference:
        raise UsageError(
            f"{line}: options of a loss are set at the top level; write"
            f" {name}={override.get_value_element_as_str()}"
        )
    if override.is_add() and known:
        raise UsageError(f"{line}: {key} exists already; write {line.lstrip('+')}")
    if override.is_delete() and known:
        raise UsageError(f"{line}: {key} cannot be removed; set another value, or null if allowed")
    if not known and (not (override.is_add() and open_ended) or renamed.message(key)):
        add = f". Add it as a new argument: +{line}" if open_ended else ""
        raise UsageError(unknown(composer, key, override.value(), reference, chosen, add))


def unknown(
    composer: Composer, key: str, value: Any, reference: DictConfig, chosen: DictConfig, add: str = ""
) -> str:
    """Return the error message for an unknown key.

    It names the new name of the option, the configs that have it, or the closest existing option. `add` is
    appended for a key that could be added as a new argument.
    """
    if message := renamed.message(key, value):
        return message
    path, _, name = key.rpartition(".")
    choices = {str(group).rpartition("@")[2]: str(group) for group in chosen}  # path in the config -> group
    group = choices.get(path or "loss", "")  # options of a loss are at the top level
    if owners := composer.owners(group.partition("@")[0], name) if group else []:
        if chosen[group] in owners:  # a YAML file of a loss that does not begin with "# @package _global_"
            place = f"{group}.{key}"
            return f"{key}: expected {place}, as in the YAML file of {group}={chosen[group]}; write {place}"
        own = ", ".join(composer.options(group.partition("@")[0], chosen[group])) or "none"
        use = listed(f"{group}={choice}" for choice in owners)
        return f"{key} is an option of {use}, not of {group}={chosen[group]} (options: {own})"
    outer = path.rpartition(".")[0]
    if outer in choices and composer.owners_of_part(outer, path.rpartition(".")[2]):
        return f"Unknown option '{key}': {missing_part(composer, path, chosen)}"
    synonym = renamed.SYNONYMS.get(name)
    missing = object()
    if synonym is not None and OmegaConf.select(reference, synonym, default=missing) is missing:
        group, _, option = synonym.rpartition(".")
        owners = composer.owners(group := group or "loss", option) if not group.startswith("hydra") else []
        of = f" of {listed([f'{group}={choice}' for choice in owners], 'or')}" if owners else ""
        suggestion = f" Did you mean '{synonym}'{of}?"
    elif synonym is not None:
        suggestion = f" Did you mean '{synonym}'?"
    else:
        names = [*dotted_keys(reference), *map(str, reference)]
        suggestion = nearest(key, [name for name in names if not key.startswith(f"{name}.")])
    return f"Unknown option '{key}'.{suggestion} List all: ssl-run --cfg job{add}"


def check_tree(config: DictConfig, reference: DictConfig, path: str = "", open_ended: bool = False) -> None:
    """Raise UsageError for unknown keys, and for values whose type differs from that of the default.

    `reference` holds the defaults. Unknown keys are allowed below a `_target_`, as arguments, and in
    OPEN_MAPS, as entries that have a `_target_`.
    """
    open_ended = open_ended or "_target_" in reference
    for name in map(str, config):
        key = f"{path}{name}"
        if name in reference:
            check_node(config[name], reference, name, key, open_ended)
        elif message := renamed.message(key, config[name]):
            raise UsageError(message)
        elif path[:-1] in OPEN_MAPS:
            if not isinstance(config[name], DictConfig) or "_target_" not in config[name]:
                raise UsageError(
                    f"{key}={config[name]}: expected a _target_; add +{key}._target_=<module>.<class>"
                )
        elif path and not open_ended:
            raise UsageError(
                f"Unknown option '{key}'.{nearest(name, map(str, reference), path)}"
                " List all: ssl-run --cfg job"
            )


def check_node(value: Any, reference: DictConfig, name: str, key: str, open_ended: bool) -> None:
    """Check the value of an option that `reference` has, and everything below it, as `check_tree` does."""
    default = reference[name]
    if isinstance(default, DictConfig):
        if not isinstance(value, DictConfig):
            raise UsageError(
                f"{key}={value}: expected a group of options ({', '.join(map(str, default))});"
                " set these instead"
            )
        if value.get("_target_") == default.get("_target_"):
            check_tree(value, default, f"{key}.", open_ended)
    elif not (key in RULES | LOSS_RULES or default is None or OmegaConf.is_interpolation(reference, name)):
        rule = Rule(type(default)) if type(default) in (int, float, bool, str) else None
        if (rule and not rule.accepts(value)) or (
            isinstance(default, ListConfig) and not isinstance(value, ListConfig)
        ):
            raise UsageError(f"{key}={format_value(value)}: expected {rule or 'a list'}")


def check_logger(config: DictConfig) -> None:
    """Raise UsageError if the library of one of the package's loggers is not installed."""
    package, _, library = str(config.logger.get("_target_")).rpartition(".")[0].rpartition(".")
    if package != "ssl_runner.loggers":
        return
    spec = find_spec(library)
    if spec is None or spec.origin is None:  # the folder wandb/ of earlier runs is no library
        raise UsageError(
            f"logger={library}: expected {library} to be installed; run pip install 'ssl_runner[{library}]'"
        )


def check_solved_backbone(config: DictConfig, overrides: list[Override]) -> None:
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
