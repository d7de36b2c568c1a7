"""A conversation; the last message is the completion."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import stated_class, turns

KEYS = frozenset({"messages"})
SHAPE = '{"messages":[{"role","content"},...]}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is every message but the last."""
    conversation = turns(record, "messages", "a list")
    label, stated = stated_class(record)
    *context, last = conversation
    return [Example(last.content, tuple(context), last.role, label=label, origin=origin, stated=stated)]
