"""A conversation; the last message is the completion."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import turns

KEYS = frozenset({"messages"})
SHAPE = '{"messages":[{"role","content"},...]}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is every message but the last."""
    conversation = turns(record, "messages", "a list")
    return [Example(conversation[-1].content, conversation[:-1], conversation[-1].role, origin=origin)]
