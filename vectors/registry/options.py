"""The options of methods, optimisers and requests: their names, defaults, ranges and help texts.

An `Option` belongs to a merge method or an optimiser; `option` makes a field of a typed request, from which the command
line derives a command's options and their help.
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vectors.documents.numbers import number
from vectors.errors import guess

R = TypeVar("R")


class Option(NamedTuple):
    """One option of a method. Values lie in [low, high], or (low, high] with `open_low`; or are one of `choices`."""

    name: str
    default: Any
    meaning: str
    each: bool = False  # every input has its own value
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """The value; if the option takes numbers, text such as "0.9" is converted to a number."""
        return value if self.choices or isinstance(self.default, bool) else number(value)

    def problem_of(self, value: Any) -> str | None:
        """What is wrong with a single value (not a gradient or filters), or None."""
        if self.choices:
            if value in self.choices:
                return None
            return f"{self.name} is {value!r}, not {' or '.join(self.choices)}{guess(str(value), self.choices)}"
        if isinstance(self.default, bool):
            return None if isinstance(value, bool) else f"{self.name} is {value!r}, not true or false"
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            return f"{self.name} is {value!r}, not a number"
        if isinstance(self.default, int) and self.default is not None and value != int(value):
            return f"{self.name} is {value!r}, not a whole number"
        if value < self.low or value > self.high or (self.open_low and value == self.low):
            return f"{self.name} is {value:g}, outside {self.range()}"
        return None

    def range(self) -> str:
        """The interval of its values, such as `(0, 1]`."""
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def retained_count(density: float, count: int) -> int:
    """The number of elements that a density retains of `count`, at least 1; in decimals, so that 0.29 of 100 is 29."""
    return min(max(int(Decimal(repr(float(density))) * count), 1), count)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flag: str | tuple[str, ...] | None = None,
    old: tuple[str, ...] = (),
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    names: Callable[[], Iterable[str]] | None = None,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    parse: Callable[[Any], Any] | None = None,
    default_text: str | None = None,
    argument: bool = False,
    complete: str = "",
    group: str = "",
) -> Any:
    """A field of a typed request (a frozen, keyword-only dataclass) that a command can derive an option from.

    The field's name and type determine the rest: `max_tokens: int` is `--max-tokens`, a bool is a flag, `tuple[X, ...]`
    may be given several times, `Mapping[str, X]` takes NAME=VALUE several times, `X | None` has no default.

    default       the value when nothing is given; left out: required
    help          a full phrase; `{names}` in it is replaced by what `names` lists, when the help is printed
    flag          the option's words where they differ from the field's name, such as ("-o", "--out")
    old           words of earlier releases: still taken, with a warning, and not shown
    choices       the words it takes, checked by `problems_of`
    names         lists the names of a registry, for help and completion; not checked here
    low, high     the range of a number, `low` excluded if `open_low`, checked by `problems_of`
    parse         converts the text (or texts) given to the field's value; raises UsageError
    default_text  the default as shown in the help, where the value alone is not clear
    argument      True for a positional argument
    complete      what a shell completes: "models", "vectors"; paths are completed for a Path anyway
    group         the heading in the help under which it is listed
    """
    words = (flag,) if isinstance(flag, str) else flag or ()
    facts = Flag(
        help, words, old, metavar, choices, names, low, high, open_low, parse, default_text, argument, complete, group
    )
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={OPTION: facts})
    return dataclasses.field(default=default, metadata={OPTION: facts})


OPTION = "option"  # the key of a field's metadata


class Flag(NamedTuple):
    """The metadata that `option` attaches to a field; see `option` for the meanings."""

    help: str
    words: tuple[str, ...]
    old: tuple[str, ...]
    metavar: str | None
    choices: tuple[str, ...]
    names: Callable[[], Iterable[str]] | None
    low: float | None
    high: float | None
    open_low: bool
    parse: Callable[[Any], Any] | None
    default_text: str | None
    argument: bool
    complete: str
    group: str

    def word(self, field: str) -> str:
        """How messages name the option: its long flag, or the name of an argument."""
        if self.argument:
            return self.metavar or field.upper()
        return next((word for word in self.words if word.startswith("--")), f"--{field.strip('_').replace('_', '-')}")


def flags_of(request: Any) -> dict[str, Flag]:
    """The fields of a request, or of its type, that were made by `option`."""
    return {field.name: field.metadata[OPTION] for field in dataclasses.fields(request) if OPTION in field.metadata}


def several(request: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request's fields, where a field that holds several takes one value or any sequence of them."""
    hints = typing.get_type_hints(request)
    made = dict(values)
    for name, value in values.items():
        if typing.get_origin(hints.get(name)) is tuple:
            item, one = typing.get_args(hints[name])[0], isinstance(value, str | bytes | os.PathLike | int | float)
            listed = (value,) if one else tuple(value or ())
            made[name] = tuple(Path(each) if item is Path else each for each in listed)
    return made


def problems_of(request: Any) -> list[str]:
    """What is wrong with the values of a request, one sentence each: unknown choices, and numbers out of
    range or not finite.

    Requests nested in its fields are checked too.
    """
    problems = []
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if dataclasses.is_dataclass(value):
            problems += problems_of(value)
        if OPTION not in field.metadata or value is None:
            continue
        flag: Flag = field.metadata[OPTION]
        problems += problems_of_option(flag, field.name, value)
    return problems


def without_problems(request: R) -> R:
    """The request with the default in place of every value that has a problem, so that all else can be checked too."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(request):  # type: ignore[arg-type]
        value = getattr(request, field.name)
        if OPTION in field.metadata and value is not None and problems_of_option(field.metadata[OPTION], "", value):
            factory = field.default_factory
            changed[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return dataclasses.replace(request, **changed)  # type: ignore[type-var]


def problems_of_option(flag: Flag, name: str, value: Any) -> list[str]:
    """What is wrong with the value, or the values, of the field `name`, one sentence each."""
    values = value if isinstance(value, tuple) else (value,)
    return [problem for item in values if (problem := _problem(flag, flag.word(name), item))]


def _problem(flag: Flag, word: str, value: Any) -> str | None:
    if flag.choices and value not in flag.choices:
        known = ", ".join(flag.choices[:-1]) + " or " * (len(flag.choices) > 1) + flag.choices[-1]
        return f"{word} is {value!r}, not {known}{guess(str(value), flag.choices)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    low, high = (-math.inf if flag.low is None else flag.low), (math.inf if flag.high is None else flag.high)
    if low <= value <= high and not (flag.open_low and value == low):
        return f"{word} is {value:g}, not a finite number" if value in (math.inf, -math.inf) else None
    if flag.low is None and flag.high is None:  # nan, which lies in no range
        return f"{word} is {value:g}, not a finite number"
    if high == math.inf:
        return f"{word} is {value:g}, not {'above' if flag.open_low else 'at least'} {low:g}"
    return f"{word} is {value:g}, outside {Option(word, value, '', low=low, high=high, open_low=flag.open_low).range()}"
