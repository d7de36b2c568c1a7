"""A text and its class, as sets for classification have them: 1 and 0, true and false, positive and negative."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import stated_class, text

KEYS = frozenset({"text", "label"})
SHAPE = '{"text","label"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example without a context; which class it belongs to is None where the label is of another kind."""
    label, stated = stated_class(record)
    return [Example(text(record, "text"), label=label, origin=origin, stated=stated)]
