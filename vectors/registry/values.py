"""Reading of numbers, booleans, words and lists, the same in YAML files and in `--set NAME=VALUE`.

PyYAML implements YAML 1.1, where `5e-4` is text, `010` is 8 and `1:30` is 90. Here numbers are those of YAML 1.2, which
are what Python's `float()` reads (`5e-4`, `.5`, `1_000`) except `inf` and `nan`, and also `0x1f`, `0o17` and `.inf`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from vectors.errors import UsageError

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_WHOLE = re.compile(rf"[-+]?{_DIGITS}|0x[0-9a-fA-F]+|0o[0-7]+")
_DECIMAL = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


def number(value: Any) -> Any:
    """The number that a text is, an int if it is whole; any other value unchanged, for the caller to check.

    The words `inf` and `nan` are text; a number that is too large becomes `inf`, which no option accepts.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _WHOLE.fullmatch(text):
        digits = text.replace("_", "")
        if digits.startswith(("0x", "0o")):
            return int(digits, 0)
        return int(digits) if len(digits) < 400 else float(digits)
    if _DECIMAL.fullmatch(text):
        return float(text.replace("_", ""))
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return value


def load_yaml(text: str) -> Any:
    """The value of a YAML or JSON document, with numbers as `number` reads them. Raises yaml.YAMLError, ValueError."""
    import yaml

    return yaml.load(text, _loader())


def read_value(text: str) -> Any:
    """One value typed on the command line: a number, true, false, a word, or a YAML list. Raises ValueError."""
    import yaml

    try:
        return number(load_yaml(text))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_assignments(texts: Iterable[str], flag: str = "--set") -> dict[str, Any]:
    """NAME=VALUE texts as a mapping; the last value of a name is used. Raises UsageError with all problems."""
    values: dict[str, Any] = {}
    problems = []
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            problems.append(f"{flag} {text!r} is not NAME=VALUE")
            continue
        try:
            values[name] = read_value(value)
        except ValueError as error:
            problems.append(f"{flag} {text!r} has a value that can't be read: {error}")
    if problems:
        raise UsageError(problems, f"write {flag} epsilon=0.1")
    return values


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader with the numbers of this module instead of its own."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number_tags = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in number_tags]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in zip(
        number_tags, (_WHOLE, re.compile(f"(?:{_DECIMAL.pattern}|{_SPECIAL.pattern})")), strict=True
    ):
        Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern.pattern})\Z"), list("-+.0123456789"))
        Loader.add_constructor(tag, lambda loader, node: number(loader.construct_scalar(node)))
    return Loader
