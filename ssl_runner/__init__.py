"""ssl_runner: self-supervised learning as a function of embeddings Z and a graph G of positive pairs."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> its module, which is imported on first use, since it imports torch
_LAZY = {"load": "ssl_runner.pretrained", "run": "ssl_runner.api"}


__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
