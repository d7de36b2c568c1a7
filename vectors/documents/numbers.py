"""Numbers as people write them in YAML files and in `--set NAME=VALUE`.

They are those of YAML 1.2, which are what Python's `float()` reads (`5e-4`, `.5`, `1_000`) except `inf` and `nan`, and
also `0x1f`, `0o17` and `.inf`.
"""

from __future__ import annotations

import re
from typing import Any

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
WHOLE = re.compile(rf"[-+]?{_DIGITS}|0x[0-9a-fA-F]+|0o[0-7]+")
DECIMAL = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


LONGEST = 400  # digits of a whole number; a longer one is taken as its float


def number(value: Any) -> Any:
    """The number that a text is, an int if it is whole; any other value unchanged, for the caller to check.

    The words `inf` and `nan` are text; a number that is too large becomes `inf`, which no option accepts.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if WHOLE.fullmatch(text):
        digits = text.replace("_", "")
        if digits.startswith(("0x", "0o")):
            return int(digits, 0) if len(digits) < LONGEST else float("inf")
        return int(digits) if len(digits) < LONGEST else float(digits)
    if DECIMAL.fullmatch(text):
        return float(text.replace("_", ""))
    if SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return value
