"""Caches of Hydra's work. `ssl-run` composes five times, which takes longer than a tiny training.

A result is used again for the same input and the same texts of config files. Callers get copies of it.
"""

import functools
import pickle
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser


def config(repository: ConfigRepository, config_path: str) -> Hashable:
    """The place of a config, and its text."""
    source = repository._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "file":
        return source and source.path, config_path
    file = Path(source.path, source._normalize_file_name(config_path))
    return source.provider, file, file.read_bytes()


def defaults_list(loader: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Hashable:
    """The defaults list, the search path, and the text of every config file."""
    sources = repo.get_sources()
    folders = [Path(source.path) for source in sources if source.scheme() == "file"]
    texts = [(file, file.read_bytes()) for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    return repr(defaults), *((source.provider, source.path) for source in sources), *texts


def override(parser: OverridesParser, text: str, rule: str) -> Hashable:
    return text, rule


def cached(method: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    """Return a method that keeps its results under key(self, *arguments)."""
    results: dict[Hashable, bytes] = {}

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        entry = key(*args, **kwargs)
        if entry not in results:
            results[entry] = pickle.dumps(method(*args, **kwargs))
        return pickle.loads(results[entry])

    return call


CACHED: list[tuple[type, str, Callable[..., Hashable]]] = [
    (ConfigRepository, "load_config", config),
    (OverridesParser, "parse_rule", override),
    (ConfigLoaderImpl, "_compose_config_from_defaults_list", defaults_list),
]


def install() -> None:
    for owner, name, key in CACHED:
        setattr(owner, name, cached(getattr(owner, name), key))
