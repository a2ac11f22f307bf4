"""A rule for the value of an option. Imports neither Hydra nor torch."""

import math
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import ListConfig


@dataclass
class Rule:
    """Accepted values of an option: a type with bounds or a set of choices, and null if `optional`.

    `many` also accepts a non-empty list of such values; `or_int` accepts an int where text is
    expected, and `or_bool` a bool beside the choices.

    `low` and `high` are inclusive; `open_low` excludes `low`. An int is accepted where a float is expected.
    """

    kind: type[int] | type[float] | type[bool] | type[str]
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str | int, ...] = ()
    optional: bool = False
    many: bool = False
    or_int: bool = False
    or_bool: bool = False

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.many and isinstance(value, ListConfig):
            one = replace(self, many=False, optional=False)
            return len(value) > 0 and all(map(one.accepts, value))
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.kind:
            return (self.or_int and type(value) is int) or (self.or_bool and type(value) is bool)
        if self.choices:
            return value in self.choices
        if self.kind in (int, float) and isinstance(value, (int, float)):
            above = value > self.low if self.open_low else value >= self.low
            return above and value <= self.high and math.isfinite(value)
        return True

    def __str__(self) -> str:
        if self.choices:
            choices = [*map(str, self.choices), *(["true", "false"] if self.or_bool else [])]
            text = "one of " + ", ".join(choices)
        else:
            text = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[self.kind]
            if self.high < math.inf:
                bounds = (
                    f"> {self.low} and <= {self.high}" if self.open_low else f"from {self.low} to {self.high}"
                )
                text += f" {bounds}"
            elif self.low > -math.inf:
                text += f" {'>' if self.open_low else '>='} {self.low}"
        text += " or an integer" if self.or_int else ""
        return text + (" or a list of these" if self.many else "") + (" or null" if self.optional else "")
