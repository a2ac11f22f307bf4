"""ssl_runner: self-supervised learning as a function of embeddings Z and a graph G of positive pairs."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public functions, by the module that defines them. It is imported on first use, since it imports torch.
_LAZY = {"load": "ssl_runner.pretrained"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
