"""`NAME.FIELD=VALUE` as people type it, and what it changes in `personality.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.store.layout import Store
from steer.store.working import document
from vectors.documents.numbers import number
from vectors.errors import UsageError, guess

FIELDS = ("strength", "layers", "scope", "condition", "operation", "path", "digest")
SECTIONS = ("serve", "merge")


def apply(store: Store, settings: Sequence[str]) -> dict[str, Any]:
    """Change the document; returns what was set. Raises UsageError with every setting that is wrong."""
    names = [entry.name for entry in document.read(store.file).parts]
    changes: list[tuple[str | None, tuple[str, ...], Any]] = []
    problems: list[str] = []
    for text in settings:
        key, equals, value = text.partition("=")
        section, dot, field = key.rpartition(".")
        if not equals or not key:
            problems.append(f"{text!r} is not NAME.FIELD=VALUE")
        elif key in ("base", "base_digest"):
            changes.append((None, (key,), value or None))
        elif dot and section in SECTIONS:
            changes.append((None, (section, field), _value(value)))
        elif not dot or section not in names:
            problems.append(f"there is no part {section or key!r}{guess(section or key, names)}")
        elif field not in FIELDS:
            problems.append(f"a part has no field {field!r}{guess(field, FIELDS)}")
        else:
            changes.append((section, (field,), _value(value) if field == "strength" else value or None))
    if problems:
        raise UsageError(problems, "steer set warm.strength=0.8 serve.temperature=0.7")
    content = document.content_of(store.file)
    for part, keys, value in changes:
        change = document.with_field(keys, value) if part is None else document.with_part(part, {keys[0]: value})
        content = document.edited(content, change, str(store.file))
    document.write(store.file, content)
    return {".".join(filter(None, [part, *keys])): value for part, keys, value in changes}


def _value(text: str) -> Any:
    """A value as YAML would read it: a number, true or false, or text; None for nothing."""
    if text in ("true", "false"):
        return text == "true"
    return number(text) if text else None
