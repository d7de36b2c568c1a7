"""The flags for vLLM that `steer serve` reads itself, as vLLM writes them: with `_` for `-`, with `=`, abbreviated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vectors.documents import yaml_text
from vectors.documents.json_text import read_bounded


def taken(
    flags: Sequence[str], name: str, shortest: str, *, several: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The flags without `name` and its values, and these values.

    `shortest` is the shortest abbreviation that no other flag of vLLM has. With `several`, all values up to the next
    flag belong to it.
    """
    rest: list[str] = []
    values: list[str] = []
    taking = False
    for flag in flags:
        word, equals, value = flag.partition("=")
        word = word.replace("_", "-")
        if len(word) >= len(shortest) and name.startswith(word):
            taking = not equals
            values += [value] if equals else []
        elif taking and not flag.startswith("-"):
            values.append(flag)
            taking = several
        else:
            taking = False
            rest.append(flag)
    return tuple(rest), tuple(values)


def value_of(flags: Sequence[str], name: str, shortest: str) -> str | None:
    """The value that vLLM takes for a flag: the last one, else that of the file in --config; None without one."""
    values = taken(flags, name, shortest)[1]
    if values:
        return values[-1]
    value = _configured(flags).get(name.removeprefix("--"))
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def has(flags: Sequence[str], name: str, shortest: str) -> bool:
    """Whether a flag without a value is given, also in the file of --config."""
    words = (flag.partition("=")[0].replace("_", "-") for flag in flags)
    given = any(len(word) >= len(shortest) and name.startswith(word) for word in words)
    return given or _configured(flags).get(name.removeprefix("--")) is True


def served_name(flags: Sequence[str]) -> str | None:
    """The first name in --served-model-name among vLLM's flags; None where it is not given."""
    names = taken(flags, "--served-model-name", "--ser", several=True)[1]
    if names:
        return names[0] or None
    configured = _configured(flags).get("served-model-name")
    first = configured[0] if isinstance(configured, list) and configured else configured
    return str(first) if first else None


def _configured(flags: Sequence[str]) -> Mapping[str, Any]:
    """The values in the YAML file of --config, by their flags without dashes; vLLM reports what is wrong with it."""
    files = taken(flags, "--config", "--config")[1]
    if not files:
        return {}
    try:
        values = yaml_text.parse(read_bounded(Path(files[-1]), yaml_text.LARGEST).decode("utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return {str(key).replace("_", "-"): value for key, value in values.items()} if isinstance(values, dict) else {}
