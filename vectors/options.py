"""What a method can be told: each option's name, default, range and meaning, and its value at each tensor.

A value is a number, a list of numbers (a gradient, interpolated over the layers), or a list of {filter, value} whose
first matching entry counts. A filter is a glob over the tensor's name; one without wildcards matches anywhere in it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from vectors.errors import guess


class Option(NamedTuple):
    """One option of a method. `low` and `high` are included unless `open_low`; `choices` makes it a word."""

    name: str
    default: Any
    meaning: str
    each: bool = False  # every input has its own
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> str | None:
        """What is wrong with one plain value, or None."""
        if self.choices:
            if value in self.choices:
                return None
            return f"{self.name} is {value!r}, not {' or '.join(self.choices)}{guess(str(value), self.choices)}"
        if isinstance(self.default, bool):
            return None if isinstance(value, bool) else f"{self.name} is {value!r}, not true or false"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{self.name} is {value!r}, not a number"
        if isinstance(self.default, int) and self.default is not None and value != int(value):
            return f"{self.name} is {value!r}, not a whole number"
        if value < self.low or value > self.high or (self.open_low and value == self.low):
            return f"{self.name} is {value:g}, outside {self.range()}"
        return None

    def range(self) -> str:
        """The interval of its values, as people write it."""
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


def weight(default: float = 1.0) -> Option:
    return Option("weight", default, "how much of this input", each=True)


def density(default: float = 0.2) -> Option:
    return Option("density", default, "the part of a delta that is kept", each=True, low=0, high=1, open_low=True)


SCALE = Option("lambda", 1.0, "the merged delta is multiplied by this")
NORMALIZE = Option("normalize", False, "divide by the sum of the weights")
ELECT = Option(
    "elect", "before", "whether signs are elected before or after the deltas are weighted", choices=("before", "after")
)
COMBINE = Option(
    "combine", "mean", "the mean of what agrees with the elected sign, or its sum", choices=("mean", "sum")
)
ZERO = Option(
    "zero",
    "none",
    "the sign elected where the votes cancel: none (the result is 0) or positive",
    choices=("none", "positive"),
)


def check_value(option: Option, value: Any, where: str) -> list[str]:
    """What is wrong with a value as it stands in a recipe: a number, a gradient, or filters."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        problems = []
        for item in value:
            unknown = sorted(set(item) - {"filter", "value"})
            problems += [f"{where}: unknown key {key!r} beside filter and value" for key in unknown]
            if "value" not in item:
                problems.append(f"{where}: an entry without value")
            else:
                problems += check_value(option, item["value"], where)
        return problems
    if isinstance(value, list):
        if not value or option.choices or isinstance(option.default, bool):
            return [f"{where}: {option.name} can't be the list {value!r}"]
        found = [option.check(item) for item in value]
    else:
        found = [option.check(value)]
    return [f"{where}: {problem}" for problem in found if problem]


def resolve(value: Any, name: str, position: float, default: Any) -> Any:
    """The value at one tensor. `position` is where its layer stands, from 0 (the first) to 1 (the last)."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        for item in value:
            pattern = item.get("filter")
            if pattern is None or pattern == "*" or matches(str(pattern), name):
                return resolve(item["value"], name, position, default)
        return default
    if isinstance(value, list):
        at = position * (len(value) - 1)
        low = min(math.floor(at), len(value) - 1)
        high = min(low + 1, len(value) - 1)
        return float(value[low]) + (at - low) * (float(value[high]) - float(value[low]))
    return value


def matches(pattern: str, name: str) -> bool:
    """Whether a filter takes a tensor's name: a glob, or a part of the name."""
    return fnmatch.fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


def kept(density: float, count: int) -> int:
    """How many of `count` elements a density keeps: at least one. In decimals, so that 0.29 of 100 is 29."""
    return min(max(int(Decimal(repr(float(density))) * count), 1), count)
