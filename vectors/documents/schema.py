"""Schemas of JSON values: a value is checked field by field, and each problem names its field and the value.

    BASE = record({"digest": text()}, {"layers": optional(whole(0, 1000))})
    problems_of({"digest": 5}, BASE, "base")     # ["base.digest is 5, not text"]

A check is a function of a value and of the field's name that yields problems. Fields that a schema does not name are
allowed: later versions may add some.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Check = Callable[[Any, str], Iterator[str]]

MOST = 20  # problems that are listed of one value's fields, and as many of the entries of its lists
SCANNED = 100_000  # problems that are read to find those of other kinds
SHOWN = 60  # characters of a value that a problem shows
_INDEX = re.compile(r"\[\d+\]")
_ENTRY = re.compile(r"[^\s\[]*\[\d+\]\S*(?: has the unknown key \S+| \w+)?")  # a name with an index, and what is wrong
LONGEST_TEXT = 1_000_000  # characters


def problems_of(value: Any, check: Check, name: str = "") -> list[str]:
    """What is wrong with a value; `name` is that of the value itself.

    At most `MOST` of its fields, and then as many of the entries of lists: the first of each kind, then the second of
    each, since a list of many wrong entries would hide all other problems.
    """
    of_fields: list[str] = []
    of_entries: list[tuple[int, int, str]] = []  # how many of its kind came before, its place, the problem
    alike = Counter[str]()
    count = 0
    for count, problem in enumerate(itertools.islice(check(value, name), SCANNED), 1):
        entry = _ENTRY.match(problem)
        kind = "" if entry is None else _INDEX.sub("[]", entry[0])
        alike[kind] += 1
        if entry is None and alike[kind] <= MOST:
            of_fields.append(problem)
        elif entry is not None and alike[kind] <= MOST:
            of_entries.append((alike[kind], count, problem))
    chosen = sorted(sorted(of_entries)[:MOST], key=lambda entry: entry[1])
    problems = [*of_fields, *(problem for _, _, problem in chosen)]
    return problems if len(problems) == count else [*problems, "there are more problems like these"]


def excerpt(value: Any) -> str:
    """A value as a problem shows it: in a bounded number of characters, whatever it is."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= SHOWN else value[:SHOWN] + "…", ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # Python refuses to print very long integers.
        return str(value) if value.bit_length() < 200 else f"a number of about {value.bit_length() * 3 // 10} digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        keys = ", ".join(excerpt(key) for key in itertools.islice(value, 3))
        return f"an object with the keys {keys}{' …' if len(value) > 3 else ''}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} value{'s' * (len(value) != 1)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def anything(value: Any, name: str) -> Iterator[str]:
    """Any JSON value."""
    yield from ()


def text(pattern: str = "", wanted: str = "text", longest: int = LONGEST_TEXT) -> Check:
    """Text that matches a regular expression, which `wanted` says in words."""
    compiled = re.compile(pattern or r"[\s\S]*")

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, str) or len(value) > longest or not compiled.fullmatch(value):
            yield _wrong(name, value, wanted)

    return check


def whole(low: int, high: int) -> Check:
    """A whole number in a range, both ends included."""

    def check(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            yield _wrong(name, value, f"a whole number from {low} to {high}")

    return check


def number(value: Any, name: str) -> Iterator[str]:
    """A finite number within the range of float64."""
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond it
        good = False
    if not good:
        yield _wrong(name, value, "a finite number")


def boolean(value: Any, name: str) -> Iterator[str]:
    """True or false."""
    if not isinstance(value, bool):
        yield _wrong(name, value, "true or false")


def one_of(*values: Any) -> Check:
    """One of these values, which are of simple types."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            yield _wrong(name, value, " or ".join(map(excerpt, values)))

    return check


def optional(check: Check) -> Check:
    """Null, or what `check` allows."""
    return lambda value, name: iter(()) if value is None else check(value, name)


def list_of(check: Check, longest: int = 1_000_000) -> Check:
    """A list whose entries all pass `check`."""

    def checked(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list | tuple) or len(value) > longest:
            yield _wrong(name, value, "a list")
            return
        for i, entry in enumerate(value):
            yield from check(entry, f"{name}[{i}]")

    return checked


def tuple_of(*checks: Check, wanted: str) -> Check:
    """A list with one entry for each check, which `wanted` says in words."""

    def checked(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list | tuple) or len(value) != len(checks):
            yield _wrong(name, value, wanted)
            return
        for i, (check, entry) in enumerate(zip(checks, value, strict=True)):
            yield from check(entry, f"{name}[{i}]")

    return checked


def mapping_of(check: Check, key: Check | None = None) -> Check:
    """An object with any keys, whose values all pass `check` and whose keys pass `key`."""

    def checked(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _wrong(name, value, "an object")
            return
        for label, entry in value.items():
            if not isinstance(label, str) or (key is not None and any(True for _ in key(label, ""))):
                yield f"{name or 'the value'} has the key {excerpt(label)}, which is not possible there"
            yield from check(entry, _inside(name, label))

    return checked


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object that has all of the `required` fields and may have the `optional` ones; further fields are allowed."""

    def checked(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _wrong(name, value, "an object")
            return
        for label, check in required.items():
            if label in value:
                yield from check(value[label], _inside(name, label))
            else:
                yield f"{_inside(name, label)} is missing"
        for label, check in (optional or {}).items():
            if label in value:
                yield from check(value[label], _inside(name, label))

    return checked


def strict(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A `record` that may have no further fields: what a person writes, where an unknown key is a mistake."""
    fields, known = record(required, optional), [*required, *(optional or {})]

    def checked(value: Any, name: str) -> Iterator[str]:
        yield from fields(value, name)
        for label in value if isinstance(value, Mapping) else ():
            if label not in known:
                near = difflib.get_close_matches(str(label), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                yield f"{name or 'the document'} has the unknown key {excerpt(label)} ({hint})"

    return checked


def either(*checks: Check, wanted: str) -> Check:
    """What any of the checks allows; `wanted` says in words what that is."""

    def checked(value: Any, name: str) -> Iterator[str]:
        if all(any(True for _ in check(value, name)) for check in checks):
            yield _wrong(name, value, wanted)

    return checked


def _inside(name: str, label: Any) -> str:
    label = label if isinstance(label, str) and len(label) <= SHOWN else excerpt(label)
    return f"{name}.{label}" if name else label


def _wrong(name: str, value: Any, wanted: str) -> str:
    return f"{name or 'the value'} is {excerpt(value)}, not {wanted}"


def share(value: Any, name: str) -> Iterator[str]:
    """A share: a number from 0 to 1, or a percentage such as 5%."""
    if share_of(value) is None:
        yield f"{name} is {excerpt(value)}, not a share from 0 to 1, or a percentage such as 5%"


def share_of(value: Any) -> float | None:
    """The share that a number or a percentage states; None for anything else."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,12})?)\s*%\s*", value)):
        value = float(match[1]) / 100
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return float(value) if good else None


def positive(value: Any, name: str) -> Iterator[str]:
    """A number above 0."""
    yield from number(value, name)
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
        yield f"{name} is {excerpt(value)}, not above 0"
