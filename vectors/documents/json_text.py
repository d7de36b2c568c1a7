"""JSON from untrusted sources: read in bounded time and memory, more strictly than by Python's reader.

Python's reader accepts `NaN`, numbers that overflow, unpaired surrogates, and the last of two equal keys; its values
can take a hundred times the memory of the text. Here the number of values and their nesting are bounded before
and after.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from vectors.errors import SteerError

LARGEST = 64_000_000  # bytes of a document
VALUES = 1_000_000  # values of a document: at most about 250 MB in memory
DEEPEST = 100  # nested lists and objects
_CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parse(
    content: bytes | str, *, values: int = VALUES, deepest: int | None = DEEPEST, constants: bool = False,
    unique: bool = False,
) -> Any:  # fmt: skip
    """The value of a JSON text. Raises ValueError with the reason.

    A byte-order mark is skipped. `values` and `deepest` bound the number of values and their nesting (None: only by
    Python's stack). With `constants`, NaN and the infinities are allowed, as configurations of models have them; with
    `unique`, an object with two equal keys is refused.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    if sum(content.count(sign) for sign in "[{,") > values:
        raise ValueError(f"it holds more than {values:,} values")

    def constant(name: str) -> float:
        if not constants:
            raise ValueError(f"it holds {name}, which is not JSON")
        return _CONSTANTS[name]

    def decimal(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not constants:
            raise ValueError(f"it holds a number that is too large ({digits[:20]})")
        return value

    try:
        value = json.loads(
            content, parse_constant=constant, parse_float=decimal, object_pairs_hook=_unique if unique else None
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):  # Python's own words, which name a function of its own
            raise ValueError("it holds a number that is too large (of thousands of digits)") from None
        raise
    if deepest is not None:
        _check_depth(value, deepest)
    if "\\ud" in content or "\\uD" in content:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a character (an unpaired surrogate)") from error
    return value


def read(
    path: Path, error: type[SteerError], hint: str, *, largest: int = LARGEST, values: int = VALUES,
    constants: bool = True,
) -> Any:  # fmt: skip
    """The value of a JSON file. Raises `error`, with `hint`, for a file that can't be read or is damaged."""
    try:
        return parse(read_bounded(path, largest), values=values, constants=constants)
    except OSError as problem:
        raise error(f"{path} can't be read: {problem.strerror or problem}", hint) from problem
    except ValueError as problem:
        raise error(f"{path} is damaged: {problem}", hint) from problem


def read_object(path: Path, error: type[SteerError], hint: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, with `hint`, for a file that is damaged or holds anything else."""
    value = read(path, error, hint)
    if not isinstance(value, dict):
        kinds = ((list, "a list"), (str, "a text"), (bool, "true or false"), (int | float, "a number"))
        actual = next((word for kind, word in kinds if isinstance(value, kind)), "null")
        raise error(f"{path} is damaged: it holds {actual}, not an object", hint)
    return value


def read_bounded(path: Path, largest: int) -> bytes:
    """The bytes of an ordinary file of at most `largest` bytes. Raises OSError, ValueError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not an ordinary file")
    if status.st_size > largest:
        raise ValueError(f"it has {status.st_size:,} bytes; at most {largest:,} are read")
    with open(path, "rb") as file:
        return file.read(largest + 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice[:60]!r} twice")
    return value


def _check_depth(value: Any, deepest: int) -> None:
    level = [value]
    for _ in range(deepest + 1):
        level = [
            child
            for entry in level
            if isinstance(entry, dict | list)
            for child in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {deepest} levels deep")
