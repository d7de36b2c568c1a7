"""A plain text, taken as it stands."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text

KEYS = frozenset({"text"})
SHAPE = '{"text"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example without a context."""
    return [Example(text(record, "text"), origin=origin)]
