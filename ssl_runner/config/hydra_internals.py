"""Everything taken from Hydra's private API; no other module imports `hydra._internal`.

Written for Hydra 1.3. tests/test_hydra_internals.py checks that these functions still behave as described.
"""

import argparse
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import version
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins import file_config_source
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.grammar import grammar_functions
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import _run_hydra, create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from ssl_runner.errors import UsageError, one_line

__all__ = [
    "IConfigRepository",
    "JobReturn",
    "Returned",
    "allow_null_choices",
    "collected_failures",
    "config_folders",
    "config_repository",
    "config_sources",
    "enumerate_jobs",
    "environment",
    "launch_folder",
    "output_dir",
    "preserved_state",
    "remove_plugin_schemas",
    "run_hydra",
    "silence_submitit",
]
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of config files. Errors name the file and the line; a byte order mark is accepted.

    It has the name of Hydra's class, which Hydra otherwise refuses to replace.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file. Raises UsageError if it is not YAML in UTF-8, is empty, or holds no options."""
        file = Path(self.path, self._normalize_file_name(config_path)).resolve()
        if not file.is_file():
            return super().load_config(config_path)
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")
            config = OmegaConf.load(io.StringIO(text))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UsageError(
                f"{file}, line {line}: expected UTF-8; save the file in this encoding"
            ) from error
        except yaml.YAMLError as error:
            raise UsageError(f"{file}, {yaml_problem(error, text)}") from error
        if not text.strip():
            raise UsageError(f"{file}: expected options, found an empty file; write them, or remove the file")
        if not OmegaConf.is_dict(config) or isinstance(yaml.safe_load(text), str):
            raise UsageError(f"{file}: expected options; write one '<key>: <value>' per line")
        header = self._get_header_dict(text[:512])
        return ConfigResult(config=config, path=f"file://{self.path}", provider=self.provider, header=header)


def yaml_problem(error: yaml.YAMLError, text: str) -> str:
    """Return the line at which a text is not YAML, and what to do."""
    mark = getattr(error, "problem_mark", None)
    number = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
    line = [*text.split("\n"), ""][number]
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or one_line(error)
    if "\\t" in problem or "\t" in line[: len(line) - len(line.lstrip())]:
        return f"line {number + 1}: found a tab; use spaces"
    remedy = "keep one of them" if "duplicate key" in problem else "correct the YAML"
    return f"line {number + 1}: {problem}; {remedy}"


@contextmanager
def config_repository(folder: Path, config_dir: str | None) -> Iterator[IConfigRepository]:
    """Context manager in which `hydra.compose` reads the configs in `folder` and in `config_dir`, if given.

    Yields the repository of these configs. A config in `folder` precedes one of the same name in
    `config_dir`, as with Hydra's option --config-dir. Within a job, Hydra's state is restored on exit.
    """
    SourcesRegistry.instance().types["file"] = FileConfigSource
    search_path = create_config_search_path(str(folder.resolve()))
    if config_dir is not None:
        before = SearchPathQuery(provider="schema")  # the position that --config-dir gives it
        search_path.prepend("command-line", f"file://{Path(config_dir).resolve()}", anchor=before)
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    hydra = Hydra.create_main_hydra2(task_name="check", config_search_path=search_path)
    try:
        yield hydra.config_loader.repository  # type: ignore[attr-defined]
    finally:
        state.hydra = outer


def config_folders(repository: IConfigRepository) -> list[Path]:
    """Return the folders of a repository, in the order in which Hydra searches them."""
    return [Path(source.path) for source in repository.get_sources() if source.scheme() == "file"]


def enumerate_jobs(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of every job of Hydra's grid sweep, in its order.

    The list is empty if an override has no value to sweep over. Raises HydraException for a continuous range.
    """
    batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return batches[0] if batches else []


def output_dir() -> Path:
    """Return the folder that Hydra has made for the job."""
    return Path(_texts(HydraConfig.get())["output_dir"])


def config_sources(hydra: Any) -> dict[str, str]:
    """Return the folder of configs of each provider: "main", and "command-line" for that of --config-dir."""
    return {source["provider"]: source["path"] for source in _texts(hydra)["config_sources"]}


def launch_folder() -> str:
    """Return the folder from which the present job was started."""
    return _texts(HydraConfig.get())["cwd"]


def environment(hydra: Any) -> dict[str, str]:
    """Return the environment variables of the jobs (`hydra.job.env_set`)."""
    return {str(name): str(value) for name, value in hydra.job.env_set.items()}


def _texts(hydra: Any) -> Any:
    """The paths in `hydra.runtime`, which Hydra does not escape: a name may contain ${."""
    return OmegaConf.to_container(hydra.runtime, resolve=False)


def remove_plugin_schemas(folder: Path) -> None:
    """Remove plugin configs from Hydra's ConfigStore if `folder` has a <group>/<name>.yaml of the same name.

    Otherwise Hydra would validate the yaml against the plugin's schema, which has other keys.
    """
    Plugins.instance()  # imports the plugins, which fill the ConfigStore
    for file in folder.glob("*/*.yaml"):
        ConfigStore.instance().repo.get("hydra", {}).get(file.parent.name, {}).pop(file.name, None)


def allow_null_choices() -> None:
    """Make Hydra's grammar accept null in choice(...), as in the list of values `null,1`."""
    grammar_functions.choice.__annotations__["args"] |= None


def silence_submitit() -> None:
    """Make submitit not print the errors of sbatch, which it also raises, nor, twice, that Slurm has no
    accounting, which it does not need."""
    from submitit.core import utils

    logging.getLogger("submitit").setLevel(logging.ERROR)
    vars(utils)["print"] = lambda *args, **options: None


class Returned(NamedTuple):
    """What a job returns: the value that a search maximises, and whether the run was done before."""

    value: float | None
    done_before: bool


@contextmanager
def collected_failures(failed: list[JobReturn], before: list[JobReturn]) -> Iterator[None]:
    """Context manager of a sweep, in which failed jobs are added to `failed` in place of Hydra's messages,
    and those that were done before to `before`.

    Other jobs of a grid continue. A search counts a failed job as a failed trial.
    """
    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)  # repeats the errors
    logging.getLogger("optuna.storages").setLevel(logging.WARNING)  # names the study, which is in memory
    of_hydra: Any = JobReturn.return_value

    def return_value(self: JobReturn) -> Any:
        if self.status == JobStatus.COMPLETED:
            if isinstance(returned := self._return_value, Returned):
                if returned.done_before and all(one is not self for one in before):
                    before.append(self)
                return returned.value
            return returned
        if all(one is not self for one in failed):
            failed.append(self)
        if self.hydra_cfg.hydra.sweeper._target_ == BASIC_SWEEPER:  # type: ignore[union-attr]
            return None
        raise self._return_value

    JobReturn.return_value = property(return_value, of_hydra.fset)  # type: ignore[method-assign, assignment]
    try:
        yield
    except Exception as error:
        none_completed = failed and str(error) == "No trials are completed yet."  # of Optuna
        if not none_completed and all(error is not one._return_value for one in failed):
            raise
    finally:
        JobReturn.return_value = of_hydra  # type: ignore[method-assign]


@contextmanager
def preserved_state() -> Iterator[None]:
    """Context manager in which Hydra starts without global state, and which restores that of the caller."""
    state, before = Singleton.get_state(), os.environ.get("HYDRA_FULL_ERROR")
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(state)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def run_hydra(
    args: argparse.Namespace, parser: argparse.ArgumentParser, task: Callable[..., Any], folder: Path
) -> None:
    """Do what `hydra.main` does with the command line, given as the parsed `args` instead of sys.argv.

    `folder` holds config.yaml. Exceptions of the task are raised; `hydra.main` would print them and exit.
    """
    version.setbase("1.3")  # no warnings about changes since Hydra 1.1
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _run_hydra(
            args=args,
            args_parser=parser,
            task_function=task,
            config_path=str(folder),
            config_name="config",
        )
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before or "0"
