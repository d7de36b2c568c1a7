"""Reading the text fields of a line of examples; a ValueError is the phrase that follows the line in a message."""

from __future__ import annotations

import json
from typing import Any

from probes.data.examples import Message

_CLASSES = {"1": True, "1.0": True, "true": True, "positive": True, "pos": True,
            "0": False, "0.0": False, "false": False, "negative": False, "neg": False}  # fmt: skip


def text(record: dict[str, Any], key: str) -> str:
    """A field that must be a text, and not blank. Raises ValueError."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text" if key in record else f"{key} is missing")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    _whole(key, value)
    return value


def texts(record: dict[str, Any], key: str) -> list[str]:
    """A field that must be a list of texts, not empty. Raises ValueError."""
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(f"{key} must be a list of texts")
    for item in value:
        _whole(key, item)
    return value


def turns(record: dict[str, Any], key: str, wanted: str = "a text, or a list") -> tuple[Message, ...]:
    """A field that must be a list of messages, not empty; `wanted` is what it may be. Raises ValueError."""
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{key} must be {wanted} of at least one {{role, content}}")
    return tuple(Message(text(turn, "role"), text(turn, "content")) for turn in value)


def stated_class(record: dict[str, Any]) -> tuple[bool | None, str]:
    """The class that `label` states, and the label as it is written; None for one that says neither, "" for none."""
    label = record.get("label")
    if label is None:
        return None, ""
    written = label.strip() if isinstance(label, str) else str(label)
    return _CLASSES.get(written.lower()), written[:40]


def _whole(key: str, value: str) -> None:
    r"""JSON can hold half a character (an escape such as \ud83d alone), which no tokenizer takes. Raises ValueError."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{key} holds half a character (an unpaired surrogate)")


def group_of(record: dict[str, Any]) -> str:
    """The group that a line names by a text or a whole number; "" where it names none. Raises ValueError."""
    group = record.get("group")
    if not isinstance(group, str | int | None):
        raise ValueError(f"the group {json.dumps(group)[:40]} is neither text nor a whole number")
    return "" if group is None else str(group)
