"""mergekit's parameters: their names and types by method, our options for them, and how their values are read."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from merges.recipes.parameters import switch
from vectors.documents.numbers import number


class Word(NamedTuple):
    """One of mergekit's parameters: the name of our option (None: no effect on the result), the type of its values
    (number, whole or switch), and our value for each value of mergekit's, where they differ.
    """

    option: str | None
    kind: str = "number"
    values: Mapping[Any, Any] = {}


SAME = {name: Word(name) for name in ("weight", "density", "lambda", "gamma", "epsilon", "t", "scale", "tol",
                                      "select_topk")}  # fmt: skip
SAME |= {name: Word(name, "switch") for name in ("normalize", "filter_wise")} | {"max_iter": Word("max_iter", "whole")}
MASK = {"int8_mask": Word(None, "switch")}  # affects memory use, not the result
LENGTH = {"rescale": Word("rescale", "switch", {True: "l1", False: "none"})}
MEAN = {"normalize": Word("combine", "switch", {True: "mean", False: "sum"})}


def _words(*names: str, **more: Word) -> dict[str, Word]:
    return {name: SAME[name] for name in names} | more


DELTAS = _words("weight", "lambda", "density") | MASK
METHODS: dict[str, dict[str, Word]] = {
    "linear": _words("weight", "normalize"),
    "task_arithmetic": _words("weight", "lambda", "normalize") | MASK
    | {"density": Word(None), "rescale": Word(None, "switch")},
    "ties": DELTAS | LENGTH | MEAN,
    "dare_linear": DELTAS | LENGTH | _words("normalize"),
    "dare_ties": DELTAS | LENGTH | MEAN,
    "della": DELTAS | LENGTH | MEAN | _words("epsilon"),
    "della_linear": DELTAS | LENGTH | _words("epsilon", "normalize"),
    "breadcrumbs": DELTAS | LENGTH | _words("gamma", "normalize"),
    "breadcrumbs_ties": DELTAS | LENGTH | MEAN | _words("gamma"),
    "slerp": _words("t"),
    "nuslerp": _words("weight", nuslerp_row_wise=Word("along", "switch"), nuslerp_flatten=Word("along", "switch")),
    "multislerp": _words("weight", normalize_weights=Word("normalize", "switch"), eps=Word(None)),
    "karcher": _words("max_iter", "tol"),
    "model_stock": _words("filter_wise"),
    "sce": _words("select_topk") | MASK,
    "nearswap": _words("t"),
    "arcee_fusion": {},
    "passthrough": _words("scale"),
}  # fmt: skip
KNOWN = frozenset(word for words in METHODS.values() for word in words)
REQUIRED = ("weight", "t")  # mergekit has no default for these
EACH = frozenset({"weight", "density", "gamma", "epsilon", "scale"})  # each input has its own value
ELECTION = {"elect": "after", "zero": "positive"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "ties": ELECTION | {"combine": "mean", "density": 1.0},
    "dare_linear": {"rescale": "l1", "density": 1.0},
    "dare_ties": ELECTION | {"combine": "sum", "rescale": "l1", "density": 1.0},
    "della": ELECTION | {"combine": "mean", "rescale": "l1", "density": 1.0},
    "della_linear": {"rescale": "l1", "density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": ELECTION | {"combine": "sum", "density": 1.0},
    "karcher": {"max_iter": 10, "tol": 1e-5},
}


def read_setting(name: str, word: Word, value: Any, note: Callable[[str], None]) -> Any:
    """Our setting for the value of a parameter; None for an empty list, which sets nothing.

    `note` receives notes for the user. Raises ValueError with what is wrong.
    """
    if value == []:
        return None
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return [_condition(name, word, entry, note) for entry in value]
    return _gradient(name, word, value)


def _condition(name: str, word: Word, entry: dict[Any, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """One `{filter, value}`. mergekit's filters are parts of a name, without wildcards."""
    unknown = [key for key in entry if key not in ("filter", "value")]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} beside filter and value of {name}")
    if "value" not in entry:
        raise ValueError(f"an entry of {name} has no value")
    pattern = entry.get("filter")
    if not isinstance(pattern, str | None):
        raise ValueError(f"the filter {pattern!r} of {name} is not text")
    if entry["value"] == []:
        raise ValueError(f"the value of an entry of {name} is an empty list")
    result = {"value": _gradient(name, word, entry["value"])}
    if pattern is None:
        return result
    if pattern != "*" and any(c in pattern for c in "*?["):
        note(
            f"mergekit's filters have no wildcards: {pattern!r} of {name} matches only names that contain it literally"
        )
        pattern = f"*{glob.escape(pattern)}*"
    return {"filter": pattern} | result


def _gradient(name: str, word: Word, value: Any) -> Any:
    if not isinstance(value, list):
        return _scalar(name, word, value)
    if any(isinstance(item, dict) for item in value):
        raise ValueError(f"{name} mixes filters with plain values: give the last entry only a value")
    return [_scalar(name, word, item) for item in value]


def _scalar(name: str, word: Word, value: Any) -> Any:
    """One value as mergekit takes it: `5e-4`, "0.9" and true are numbers, 1.0 and "yes" are switches."""
    if word.kind == "switch":
        converted = switch(value)
        if not isinstance(converted, bool):
            raise ValueError(f"{name} is {value!r}, not true or false")
        return word.values.get(converted, converted)
    converted = number(value)
    if isinstance(converted, bool):
        converted = int(converted)
    if not isinstance(converted, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    if word.kind == "whole" and isinstance(converted, float) and converted.is_integer():
        converted = int(converted)
    return converted
