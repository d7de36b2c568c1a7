"""A conversation; the last message is the completion."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example, Message
from probes.data.fields import text

KEYS = frozenset({"messages"})
SHAPE = '{"messages":[{"role","content"},...]}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is every message but the last."""
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages must be a list of at least one {role, content}")
    turns = [Message(text(m, "role"), text(m, "content")) for m in messages]
    return [Example(turns[-1].content, tuple(turns[:-1]), turns[-1].role, origin=origin)]
