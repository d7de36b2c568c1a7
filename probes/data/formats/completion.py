"""A prompt and what follows it: one turn of a chat with a chat model, plain text with a base model."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text

KEYS = frozenset({"prompt", "completion"})
SHAPE = '{"prompt","completion"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is the prompt."""
    return [Example(text(record, "completion"), text(record, "prompt"), origin=origin)]
