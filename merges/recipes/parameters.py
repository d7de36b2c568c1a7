"""The value of a method's option at each tensor.

In a recipe a value is a number, a switch or a word; a list of them, which is a gradient over the layers (numbers are
interpolated; of switches and words, the one at the layer's position is taken); or a list of `{filter, value}` of which
the first match is used. A filter is a glob for the tensor's name; without wildcards it matches any part of the name.
Where no filter matches, the next level decides: the parameters of a slice's source, of the slice, of the input, of the
document, and at last the method's default, in this order.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vectors.registry.options import Option

SWITCHES = {"true": True, "yes": True, "on": True, "t": True, "y": True, "1": True,
            "false": False, "no": False, "off": False, "f": False, "n": False, "0": False}  # fmt: skip


def problems_of_value(option: Option, value: Any, where: str) -> list[str]:
    """What is wrong with an option's value in a recipe: a number, a gradient, or filters."""
    if _is_filtered(value):
        problems = []
        for entry in value:
            unknown = sorted(set(entry) - {"filter", "value"}, key=str)
            problems += [f"{where}: unknown key {key!r} beside filter and value" for key in unknown]
            if not isinstance(entry.get("filter"), str | None):
                problems.append(f"{where}: the filter {entry['filter']!r} of {option.name} is not text")
            if "value" not in entry:
                problems.append(f"{where}: an entry has no value")
            elif _is_filtered(entry["value"]):
                problems.append(f"{where}: {option.name} has filters inside of a filter")
            else:
                problems += problems_of_value(option, entry["value"], where)
        return problems
    if isinstance(value, list):
        if not value or any(isinstance(item, list | Mapping) for item in value):
            return [f"{where}: {option.name} can't be the list {value!r}"]
        problems_ = [option.problem_of(item) for item in value]
    else:
        problems_ = [option.problem_of(value)]
    return [f"{where}: {problem}" for problem in problems_ if problem]


def normalized(option: Option, value: Any) -> Any:
    """The value with text such as "0.9" as numbers and `1.0` or "true" as switches, where the option takes these.

    A single `{filter, value}` becomes a list. What can't be converted is unchanged, for `problems_of_value`.
    """
    if isinstance(value, Mapping) and "value" in value:
        value = [value]
    if _is_filtered(value):
        return [
            dict(entry) | {"value": normalized(option, entry["value"])} if "value" in entry else entry
            for entry in value
        ]
    if isinstance(value, list):
        return [_scalar(option, item) for item in value]
    return _scalar(option, value)


def _scalar(option: Option, value: Any) -> Any:
    if isinstance(option.default, bool):
        return switch(value)
    value = option.read(value)
    whole = isinstance(option.default, int) and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def switch(value: Any) -> Any:
    """True or false for 1, 0.0, "yes", "off" and the like; any other value unchanged."""
    if isinstance(value, str):
        return SWITCHES.get(value.lower(), value)
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def resolve(option: str, levels: Iterable[Mapping[str, Any]], name: str, position: float) -> Any:
    """The value of an option at the tensor `name`, or None if no level has one.

    `levels` are mappings of options from the most specific to the most general. `position` is that of the tensor's
    layer, from 0 (first) to 1 (last).
    """
    for level in levels:
        value = value_at(level[option], name, position) if option in level else None
        if value is not None:
            return value
    return None


def value_at(value: Any, name: str, position: float) -> Any:
    """The value of one setting at the tensor `name`, or None where none of its filters match."""
    if _is_filtered(value):
        for entry in value:
            pattern = entry.get("filter")
            if pattern is None or pattern == "*" or matches(pattern, name):
                return value_at(entry["value"], name, position)
        return None
    if isinstance(value, list):
        along = position * (len(value) - 1)
        low = min(math.floor(along), len(value) - 1)
        if any(isinstance(item, bool | str) for item in value):
            return value[low]
        high = min(low + 1, len(value) - 1)
        return float(value[low]) + (along - low) * (float(value[high]) - float(value[low]))
    return value


def then(first: Any, second: Any) -> Any:
    """One setting that has the value of `first`, and where none of its filters match, that of `second`."""
    if not _is_filtered(first):
        return first
    if any(entry.get("filter") in (None, "*") for entry in first):
        return first
    return [*first, *(second if _is_filtered(second) else [{"value": second}])]


def matches(pattern: str, name: str) -> bool:
    """Whether a filter matches the tensor `name`: as a glob, or without wildcards as a part of the name."""
    return fnmatch.fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


def _is_filtered(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
