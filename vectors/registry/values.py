"""Reading of values typed on the command line, as in `--set NAME=VALUE`: numbers, booleans, words and lists.

They are read as in YAML files (`vectors/documents`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vectors.documents import yaml_text
from vectors.documents.numbers import number
from vectors.errors import UsageError


def read_value(text: str) -> Any:
    """One value typed on the command line: a number, true, false, a word, or a YAML list. Raises ValueError."""
    return number(yaml_text.parse(text))


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
