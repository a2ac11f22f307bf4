"""Checks of the launcher and the sweeper of a command line, and the names of the jobs of a sweep."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import hydra_internals
from ssl_runner.config.rules import check_rules, format_value
from ssl_runner.errors import UsageError, counted, format_error
from ssl_runner.rule import Rule

PLUGINS = {  # override -> Hydra plugin, and the extra of this package that installs it
    "hydra/launcher=slurm": ("submitit_launcher", "slurm"),
    "hydra/launcher=joblib": ("joblib_launcher", "sweep"),
    "hydra/sweeper=optuna": ("optuna_sweeper", "sweep"),
}
OURS = {  # preset of a plugin -> the one of this package that replaces it
    "hydra/launcher=submitit_slurm": "hydra/launcher=slurm",
    "hydra/launcher=submitit_local": "hydra/launcher=joblib",
}
# option -> rule, where the launcher or sweeper has the option
RULES = {
    "hydra.sweeper.n_trials": Rule(int, low=1, optional=True),
    "hydra.sweeper.n_jobs": Rule(int, low=1, optional=True),
    "hydra.sweeper.max_failure_rate": Rule(float, low=0, high=1, optional=True),
    "hydra.sweeper.direction": Rule(str, choices=("maximize", "minimize"), optional=True),
    "hydra.launcher.timeout_min": Rule(int, low=1, optional=True),
    "hydra.launcher.array_parallelism": Rule(int, low=1, optional=True),
}


class Folders(Callback):
    """Prints the folder of a sweep before its first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).absolute()
        if slurm := "submitit" in config.hydra.launcher._target_:
            hydra_internals.silence_submitit()
        print(f"sweep={folder}{', logs of the jobs in its .submitit' if slurm else ''}", flush=True)


def check_plugins(choices: Iterable[str]) -> None:
    """Raise UsageError if the plugin of a launcher or sweeper, such as `hydra/launcher=joblib`, is not
    installed, or if a preset of this package replaces it."""
    for choice in choices:
        if choice in OURS:
            raise UsageError(f"{choice}: expected a preset of ssl_runner; use {OURS[choice]}")
        plugin, extra = PLUGINS.get(choice, ("", ""))
        if plugin and not is_installed(f"hydra_plugins.hydra_{plugin}"):
            raise UsageError(
                f"{choice}: expected hydra-{plugin.replace('_', '-')} to be installed;"
                f" run pip install 'ssl_runner[{extra}]'"
            )


def is_installed(module: str) -> bool:
    """Return whether a module can be found. Its package may be missing as well."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_sweep(hydra: DictConfig, overrides: list[Override]) -> None:
    """Raise UsageError if a sweep over these overrides cannot work with this configuration of Hydra."""
    choices = hydra.runtime.choices
    check_plugins(f"{group}={choices.get(group)}" for group in ("hydra/launcher", "hydra/sweeper"))
    check_rules(OmegaConf.create({"hydra": hydra}), RULES)
    if "n_jobs" in hydra.launcher and not (
        Rule(int).accepts(hydra.launcher.n_jobs) and hydra.launcher.n_jobs
    ):
        raise UsageError(
            f"hydra.launcher.n_jobs={format_value(hydra.launcher.n_jobs)}: expected a number of jobs, or -1"
            " for one per core"
        )
    swept = [override for override in overrides if override.is_sweep_override()]
    sampled = [override for override in overrides if is_sampled(override)]
    optuna = choices.get("hydra/sweeper") == "optuna"
    if sampled and choices.get("hydra/sweeper") == "basic":
        raise UsageError(
            f"{sampled[0].input_line}: expected values, which a grid enumerates; list them, or add"
            " hydra/sweeper=optuna to sample from the range"
        )
    if optuna and not (swept or hydra.sweeper.search_space or hydra.sweeper.custom_search_space):
        raise UsageError(
            "hydra/sweeper=optuna: expected an option to search over; add one, such as"
            " 'gamma=tag(log,interval(1,100))'"
        )


def check_ignored(override: Override, own: DictConfig, hydra: DictConfig) -> None:
    """Raise UsageError if a file of a swept group has a launcher, a sweeper or a grid of its own."""
    for group in ("hydra/launcher", "hydra/sweeper"):
        if (choice := own.runtime.choices.get(group)) not in ("basic", hydra.runtime.choices.get(group)):
            raise UsageError(
                f"{override.input_line}: sets {group}={choice}, which has no effect on a sweep over files;"
                f" add {group}={choice} to the command line"
            )
    if own.sweeper.get("params") and not hydra.sweeper.get("params"):
        raise UsageError(
            f"{override.input_line}: has a grid of its own, which has no effect on a sweep over files; start"
            " one sweep for each file"
        )


def check_single(overrides: Iterable[Override]) -> None:
    """Raise UsageError for a launcher or a sweeper on the command line of a single run."""
    for override in overrides:
        if override.key_or_group in ("hydra/launcher", "hydra/sweeper") and override.value() != "basic":
            raise UsageError(f"{override.input_line}: expected a sweep; add -m, or leave it out")


def names(job: list[Override], overrides: list[Override]) -> str:
    """Return the overrides of a job that its sweep over `overrides` sets, or all if there is no sweep."""
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    return " ".join(
        str(override.input_line)
        for override in job
        if not override.is_hydra_override() and (not swept or override.get_key_element() in swept)
    )


def job_name(hydra_config: Any) -> str:
    """Return the number of a job of a sweep, and the overrides that the sweep sets."""
    swept = hydra_config.job.override_dirname
    return f"#{hydra_config.job.num}{f' ({swept})' if swept else ''}"


def failure(job: JobReturn) -> str:
    """Name a failed job of a sweep, and its error if that is only in the log of another process."""
    hydra_config = job.hydra_cfg.hydra  # type: ignore[union-attr]
    error = format_error(job._return_value) if "submitit" in hydra_config.launcher._target_ else ""
    return f"{job_name(hydra_config)}{error and f': {error}'}"


def short_names(overrides: list[Override]) -> list[str]:
    """Return the override that leaves options that are not swept over out of `hydra.job.override_dirname`.

    The list is empty if the command line sets the option itself, or if there is nothing to leave out.
    """
    option = "hydra.job.config.override_dirname.exclude_keys"
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    fixed = {o.key_or_group: None for o in overrides if not o.is_hydra_override()}
    if not swept or option in {override.key_or_group for override in overrides}:
        return []
    return [f"{option}=[{','.join(key for key in fixed if key not in swept)}]"]


def is_sampled(override: Override) -> bool:
    """Return whether a search algorithm samples the value from a continuous range, such as `interval`."""
    return override.is_sweep_override() and not override.is_discrete_sweep()


def print_jobs(overrides: list[Override], jobs: list[str]) -> None:
    """Print the overrides of every job of a sweep, one line per job, and the number of jobs."""
    for number, job_overrides in enumerate(jobs):
        print(f"#{number} {job_overrides}")
    sampled = [str(override.input_line) for override in overrides if is_sampled(override)]
    sweeper = [str(override.input_line) for override in overrides if override.key_or_group == "hydra/sweeper"]
    summary = counted(len(jobs), "job")
    if sweeper:
        summary += f" in the grid, from which {sweeper[0]} samples"
    if sampled:
        summary += f"; not listed: {' '.join(sampled)}"
    print(summary, flush=True)
