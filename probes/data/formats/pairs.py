"""A prompt with a positive and a negative completion."""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text

KEYS = frozenset({"prompt", "positive", "negative"})
SHAPE = '{"prompt","positive","negative"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """Two examples that differ in the completion alone."""
    prompt = text(record, "prompt")
    return [
        Example(text(record, "positive"), prompt, label=True, pair=origin, origin=origin),
        Example(text(record, "negative"), prompt, label=False, pair=origin, origin=origin),
    ]
