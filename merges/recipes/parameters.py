"""The value of a method's option at each tensor.

In a recipe a value is a number, a list of numbers (a gradient, interpolated linearly over the layers), or a list of
`{filter, value}` of which the first match is used. A filter is a glob for the tensor's name; without wildcards it
matches any part of the name.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

from vectors.registry.options import Option


def problems_of_value(option: Option, value: Any, where: str) -> list[str]:
    """What is wrong with an option's value in a recipe: a number, a gradient, or filters."""
    if _is_filtered(value):
        problems = []
        for entry in value:
            unknown = sorted(set(entry) - {"filter", "value"}, key=str)
            problems += [f"{where}: unknown key {key!r} beside filter and value" for key in unknown]
            if "value" not in entry:
                problems.append(f"{where}: an entry has no value")
            else:
                problems += problems_of_value(option, entry["value"], where)
        return problems
    if isinstance(value, list):
        if not value or option.choices or isinstance(option.default, bool):
            return [f"{where}: {option.name} can't be the list {value!r}"]
        problems_ = [option.check(item) for item in value]
    else:
        problems_ = [option.check(value)]
    return [f"{where}: {problem}" for problem in problems_ if problem]


def with_numbers(option: Option, value: Any) -> Any:
    """The value with text such as "0.9" as numbers, if the option takes numbers; gradients and filters too."""
    if _is_filtered(value):
        return [
            entry | {"value": with_numbers(option, entry["value"])} if "value" in entry else entry for entry in value
        ]
    if isinstance(value, list):
        return [option.read(item) for item in value]
    return option.read(value)


def value_at(value: Any, name: str, position: float, default: Any) -> Any:
    """The value of an option at the tensor `name`.

    `position` is that of the tensor's layer, from 0 (first) to 1 (last). `default` is used where no filter matches.
    """
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        for entry in value:
            pattern = entry.get("filter")
            if pattern is None or pattern == "*" or matches(str(pattern), name):
                return value_at(entry["value"], name, position, default)
        return default
    if isinstance(value, list):
        along = position * (len(value) - 1)
        low = min(math.floor(along), len(value) - 1)
        high = min(low + 1, len(value) - 1)
        return float(value[low]) + (along - low) * (float(value[high]) - float(value[low]))
    return value


def matches(pattern: str, name: str) -> bool:
    """Whether a filter matches the tensor `name`: as a glob, or without wildcards as a part of the name."""
    return fnmatch.fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


def _is_filtered(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
