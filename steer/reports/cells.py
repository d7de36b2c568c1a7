"""The cells of a table: a number or an interval, and a dash for one that there is not."""

from __future__ import annotations

import math


def number(value: float | None, form: str = ".3f") -> str:
    """The number in this format; a dash for None."""
    return "-" if value is None else format(value, form)


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """Both bounds in this format; a dash where one is missing or infinite, as with a single item."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "-"
    return f"{format(low, form)} to {format(high, form)}"
