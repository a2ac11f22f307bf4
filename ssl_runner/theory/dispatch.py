"""Dispatch on the exact type of the first argument."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class ExactTypeDispatch(Generic[P, R]):
    """Like functools.singledispatch, but a subclass does not inherit the function of its base class.

    A closed form holds for the terms of one loss. A subclass may change the terms, so it registers its own.
    The decorated function is called for types that are not registered.
    """

    def __init__(self, fallback: Callable[Concatenate[Any, P], R]) -> None:
        update_wrapper(self, fallback)
        self.fallback = fallback
        self.registry: dict[type, Callable[Concatenate[Any, P], R]] = {}

    def register(self, function: F) -> F:
        """Use `function` for the class that annotates its first parameter, or raise TypeError."""
        cls = get_type_hints(function).get(function.__code__.co_varnames[0])
        if not isinstance(cls, type):
            raise TypeError(f"{function.__name__}: expected a class as the annotation of the first parameter")
        self.registry[cls] = function
        return function

    def registered(self, cls: type) -> bool:
        """Whether a function is registered for `cls` itself."""
        return cls in self.registry

    def __call__(self, first: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.registry.get(type(first), self.fallback)(first, *args, **kwargs)
