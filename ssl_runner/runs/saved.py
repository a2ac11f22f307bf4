"""The saved configuration of a run, which another version of this package may have written.

An option that it lacks has its default. An option that is not on the command line keeps its saved value, also
if a default or a preset has changed since.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import check, compose, hydra_internals, paths, renamed, rules
from ssl_runner.config.run_id import NO_RESULT, changes_result, compared
from ssl_runner.errors import UsageError, one_line
from ssl_runner.runs.files import atomic_write


def load(folder: Path) -> DictConfig:
    """Return the configuration in .hydra/."""
    return _read(folder, "config", _with_epochs)


def _with_epochs(saved: Any) -> Any:
    """The content of config.yaml. Raises ValueError if it is no configuration of a run."""
    if "epochs" not in saved:
        raise ValueError("no epochs")
    return saved


def overrides(folder: Path) -> list[str]:
    """Return the overrides that the run was started with. Interpolations in them are not resolved."""
    lines = _read(folder, "overrides", lambda saved: OmegaConf.to_container(saved, resolve=False))
    return [str(line) for line in lines]


def choices(folder: Path) -> Any:
    """Return the chosen config of every group of a run."""
    return _read(folder, "hydra", lambda saved: saved.hydra.runtime.choices)


def config_sources(folder: Path) -> dict[str, str]:
    """Return the folder of configs of each provider, as the run was started with."""
    return _read(folder, "hydra", lambda saved: hydra_internals.config_sources(saved.hydra))


_DAMAGED = (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError)


def _read(folder: Path, name: str, part: Callable[[Any], Any]) -> Any:
    """Return a part of a file in .hydra/. Raises UsageError if the file is damaged or lacks the part."""
    path = folder / ".hydra" / f"{name}.yaml"
    try:
        return part(OmegaConf.load(path))
    except _DAMAGED as error:
        raise UsageError(
            f"{path}: expected the YAML that ssl-run writes ({one_line(error)[:200]}); restore it, or start a"
            " new run"
        ) from error


def resumed(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration with which the run in `folder` resumes, given that of the command line.

    Raises UsageError if the command line changes an option, or if this version does not have one.
    """
    if not any(_differences(cfg, load(folder))):
        return cfg
    config = completed(folder)
    refuse_changes(cfg, config)
    return config


def completed(folder: Path) -> DictConfig:
    """Return the saved configuration, with the default of this version for every option that it lacks.

    Raises UsageError for a group that the command line changes, and for an option or a value that this
    version does not accept.
    """
    now, then = HydraConfig.get().runtime.choices, choices(folder)
    for override in compose.parse(HydraConfig.get().overrides.task):
        group = check.key_of(override)
        if group in now and changes_result(group) and now[group] != then.get(group):
            raise _changed(group, then.get(group), now[group])
    reference = _reference(OmegaConf.merge(now, then))
    config = paths.resolved(OmegaConf.merge(reference, load(folder)))
    try:
        check.check_tree(config, reference)
        rules.check_values(config)
    except UsageError as error:
        raise UsageError(f"resume={folder}: this run has options of another version: {error}") from error
    return config


def refuse_changes(cfg: DictConfig, config: DictConfig) -> None:
    """Raise UsageError if an option on the command line differs from that of the run.

    Options that change no result are copied from `cfg` to `config`.
    """
    task = compose.parse(HydraConfig.get().overrides.task)
    groups = HydraConfig.get().runtime.choices
    given = [override.key_or_group for override in task if check.key_of(override) not in groups]
    for key in _differences(cfg, config):
        if any(key == one or key.startswith(f"{one}.") for one in given):
            raise _changed(key, OmegaConf.select(config, key), OmegaConf.select(cfg, key))
    for key in NO_RESULT:
        if (value := OmegaConf.select(cfg, key)) is not None:
            OmegaConf.update(config, key, paths.escape(value), merge=False)


def keep_given(cfg: DictConfig, folder: Path) -> None:
    """Write the options of the command line that change no result to .hydra/, where the next resume reads
    them. `cfg` is the configuration of the run that resumes."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # \${ stays
    task = {check.key_of(one): str(one.input_line) for one in compose.parse(words)}
    given = {key: line for key, line in task.items() if key != "resume" and not changes_result(key)}
    before = {check.key_of(one): str(one.input_line) for one in compose.parse(overrides(folder))}
    replaced = {key for key in before if "logger" in given and key.startswith("logger.")} | given.keys()
    lines = [line for key, line in before.items() if key not in replaced] + list(given.values())
    if set(lines) == set(before.values()):
        return
    config = load(folder)
    for key in NO_RESULT:
        if any(f"{one}.".startswith(f"{key}.") for one in given):
            OmegaConf.update(config, key, paths.escape(OmegaConf.select(cfg, key)), merge=False)
    hydra: Any = _read(folder, "hydra", lambda saved: saved)
    if "logger" in given:
        hydra.hydra.runtime.choices.logger = HydraConfig.get().runtime.choices["logger"]
    for name, content in (("config", config), ("overrides", OmegaConf.create(lines)), ("hydra", hydra)):
        with atomic_write(folder / ".hydra" / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(content).encode())


def matches(cfg: DictConfig, folder: Path) -> bool:
    """Return whether a run has the configuration of the command line, also if another version wrote it.

    Options that it lacks must have their defaults. A former default (`renamed.DEFAULTS`) equals the present
    one, unless it was set on one of the command lines.
    """
    try:
        content = yaml.load((folder / ".hydra" / "config.yaml").read_text(), _LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    then, now = (compared(tree) for tree in (content, OmegaConf.to_container(cfg, resolve=True)))
    changed = {key for key in then if key not in now or then[key] != now[key]}
    absent = now.keys() - then.keys()
    if not absent or changed - renamed.DEFAULTS.keys():
        return not (absent or changed)
    given = {o.key_or_group for o in compose.parse([*HydraConfig.get().overrides.task, *overrides(folder)])}
    if any(key in given or then[key] != renamed.DEFAULTS[key] for key in changed):
        return False
    defaults = OmegaConf.merge(_reference(HydraConfig.get().runtime.choices), OmegaConf.create(content))
    values = compared(OmegaConf.to_container(defaults, resolve=True))
    return all(key in values and values[key] == now[key] for key in absent)


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _differences(cfg: DictConfig, config: DictConfig) -> Iterator[str]:
    """Yield the options that differ and can change a result."""
    for key in dict.fromkeys([*rules.dotted_keys(config), *rules.dotted_keys(cfg)]):
        if changes_result(key) and OmegaConf.select(config, key) != OmegaConf.select(cfg, key):
            yield key


def _changed(key: str, then: Any, now: Any) -> UsageError:
    change = f"{key} ({rules.format_value(then)} -> {rules.format_value(now)})"
    return UsageError(f"Cannot change {change} when resuming: leave it out, or start a new run")


def _reference(choices: Any) -> Any:
    """Return the defaults of this version for these choices, composed as for the present job."""
    hydra = HydraConfig.get()
    sources = hydra_internals.config_sources(hydra)
    args = argparse.Namespace(
        config_dir=sources.get("command-line"), config_path=sources["main"], config_name=hydra.job.config_name
    )
    added = {check.key_of(one) for one in compose.parse(hydra.overrides.task) if one.is_add()}
    with compose.composer(args) as composer:
        reference = composer.reference(choices, added)
    return OmegaConf.create(OmegaConf.to_container(reference, resolve=False))
