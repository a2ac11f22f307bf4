"""Caches of Hydra's work. `ssl-run` composes five times, which takes longer than a tiny training.

A result is used again for the same input and the same texts of config files. Callers get copies of it.
"""

import functools
import os
import pickle
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from omegaconf import DictConfig


def cached(
    function: Callable[..., Any],
    key: Callable[..., Hashable],
    keep: Callable[[Any], bool] = lambda result: True,
) -> Callable[..., Any]:
    """Return a function that stores the results to `keep` under key(*arguments)."""
    results: dict[Hashable, bytes] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        entry = key(*args, **kwargs)
        if entry in results:
            return pickle.loads(results[entry])
        result = function(*args, **kwargs)
        if keep(result):
            results[entry] = pickle.dumps(result)
        return result

    return call


def texts(repository: IConfigRepository) -> Hashable:
    """The search path, and the text of every config file."""
    sources = repository.get_sources()
    folders = [source.path for source in sources if source.scheme() == "file"]
    paths = sorted(
        os.path.join(parent, name)  # noqa: PTH118, as Path takes longer
        for folder in folders
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(".yaml")
    )
    files = [(path, Path(path).read_bytes()) for path in paths]
    return *((source.provider, source.path) for source in sources), *files


def config_key(repository: ConfigRepository, config_path: str) -> Hashable:
    """The place of a config, and its text."""
    source = repository._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "file":
        return source and source.path, config_path
    file = Path(source.path, source._normalize_file_name(config_path))
    return source.provider, file, file.read_bytes()


def rule_key(parser: OverridesParser, text: str, rule: str) -> Hashable:
    return text, rule


def groups_key(
    repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: bool
) -> Hashable:
    return config_name, *(o.input_line for o in overrides_list), *options.items(), texts(repo)


def content_key(loader: ConfigLoaderImpl, defaults: list[Any], repo: IConfigRepository) -> Hashable:
    return repr(defaults), texts(repo)


def command_key(
    loader: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
) -> Hashable:
    job = JobRuntime().get("name")
    return job, config_name, *overrides, args, *kwargs.items(), texts(loader.repository)


def independent(result: DictConfig) -> bool:
    """Whether a configuration reads neither further folders nor the environment."""
    return not result.hydra.searchpath and not result.hydra.job.env_copy


def with_folder(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Set the current folder, on which nothing else in a configuration depends."""

    @functools.wraps(load)
    def call(*args: Any, **kwargs: Any) -> DictConfig:
        result = load(*args, **kwargs)
        result.hydra.runtime.cwd = str(Path.cwd())
        return result

    return call


def with_values(create: Callable[..., DefaultsList]) -> Callable[..., DefaultsList]:
    """Add the overrides of values, on which nothing else in a defaults list depends."""

    @functools.wraps(create)
    def call(
        repo: IConfigRepository, config_name: str, overrides_list: list[Override], **options: bool
    ) -> DefaultsList:
        values = Overrides(repo, overrides_list).config_overrides
        groups = [override for override in overrides_list if override not in values]
        result = create(repo, config_name=config_name, overrides_list=groups, **options)
        result.config_overrides = values
        return result

    return call


IMPL = ConfigLoaderImpl
CACHED: list[tuple[Any, str, Callable[..., Any]]] = [
    (ConfigRepository, "load_config", cached(ConfigRepository.load_config, config_key)),
    (OverridesParser, "parse_rule", cached(OverridesParser.parse_rule, rule_key)),
    (
        IMPL,
        "_compose_config_from_defaults_list",
        cached(IMPL._compose_config_from_defaults_list, content_key),
    ),
    (
        IMPL,
        "_load_configuration_impl",
        with_folder(cached(IMPL._load_configuration_impl, command_key, independent)),
    ),
    (
        config_loader_impl,
        "create_defaults_list",
        with_values(cached(config_loader_impl.create_defaults_list, groups_key)),
    ),
]


def install() -> None:
    for owner, name, function in CACHED:
        setattr(owner, name, function)
