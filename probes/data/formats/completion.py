"""A prompt and what follows it: one turn of a chat with a chat model, plain text with a base model.

TRL's unpaired preference sets (KTO) also have a `label`, which says whether the completion is a desired one.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text

KEYS = frozenset({"prompt", "completion"})
SHAPE = '{"prompt","completion"}'
_LABELS = {True: True, False: False, "True": True, "False": False, "true": True, "false": False}  # texts in tables


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is the prompt."""
    stated = record.get("label")
    label = _LABELS[stated] if isinstance(stated, bool | str) and stated in _LABELS else None
    return [Example(text(record, "completion"), text(record, "prompt"), label=label, origin=origin)]
