"""Reading a field of a line, with the sentence that says what is wrong with it."""

from __future__ import annotations

from typing import Any


def text(record: dict[str, Any], key: str) -> str:
    """A field that must be a text with something in it. Raises ValueError."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text" if key in record else f"{key} is missing")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def texts(record: dict[str, Any], key: str) -> list[str]:
    """A field that must be a list of texts, not empty. Raises ValueError."""
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(f"{key} must be a list of texts")
    return value
