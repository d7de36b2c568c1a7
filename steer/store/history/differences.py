"""What differs between two compositions: parts, settings, and per layer the vectors themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from steer.store import blobs
from steer.store.layout import Store
from steer.store.objects.model import STEERING, TASK, Part, Personality
from vectors.registry.layers import spans

FIELDS = ("strength", "layers", "scope", "condition", "operation", "kind")


class PartChange(NamedTuple):
    """A part that differs: `before` or `after` is None where it was added or removed; `fields` are (name, old, new)."""

    name: str
    before: Part | None
    after: Part | None
    fields: tuple[tuple[str, Any, Any], ...] = ()


class Difference(NamedTuple):
    """What differs: parts, the order of those that both have, and settings as (key, old, new)."""

    parts: tuple[PartChange, ...]
    reordered: bool
    settings: tuple[tuple[str, Any, Any], ...]

    def __bool__(self) -> bool:
        return bool(self.parts or self.reordered or self.settings)


def compare(before: Personality, after: Personality) -> Difference:
    """What must change to come from one composition to the other. Parts are the same part if they have one name."""
    old, new = ({part.name: part for part in each.parts} for each in (before, after))
    changes = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            changes.append(PartChange(name, a, b))
        elif a != b:
            fields = tuple((f, getattr(a, f), getattr(b, f)) for f in FIELDS if getattr(a, f) != getattr(b, f))
            if a.digest != b.digest:
                fields = (*fields, ("digest", a.digest, b.digest))
            changes.append(PartChange(name, a, b, fields))
    both = [name for name in old if name in new]
    return Difference(tuple(changes), both != [name for name in new if name in old], tuple(_settings(before, after)))


def _settings(before: Personality, after: Personality) -> Iterator[tuple[str, Any, Any]]:
    for key in ("base", "base_digest"):
        if getattr(before, key) != getattr(after, key):
            yield key, getattr(before, key), getattr(after, key)
    for key in ("merge", "serve"):
        a, b = getattr(before, key), getattr(after, key)
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                yield f"{key}.{name}", a.get(name), b.get(name)
    if before.evals != after.evals:
        yield "evals", list(before.evals), list(after.evals)


def summary(difference: Difference) -> str:
    """The difference in one line, such as `warm 1.2 → 0.8, + formal -0.4, - calm`."""
    words = []
    for change in difference.parts:
        if change.before is None and change.after is not None:
            words.append(f"+ {change.name} {_described(change.after)}")
        elif change.after is None:
            words.append(f"- {change.name}")
        else:
            words.append(f"{change.name} " + " ".join(field_text(*field) for field in change.fields))
    if difference.reordered:
        words.append("other order")
    words += [f"{key} {_value(old)} → {_value(new)}" for key, old, new in difference.settings]
    return ", ".join(words)


def field_text(name: str, old: Any, new: Any) -> str:
    """A field of a part that changed, as text; the strength, which changes most, without its name."""
    if name == "digest":
        return f"vector {old[7:15]} → {new[7:15]}"
    change = f"{_value(old)} → {_value(new)}"
    return change if name == "strength" else f"{name} {change}"


def _described(part: Part) -> str:
    words = [f"{part.strength:g}"]
    if part.operation != "add":
        words.insert(0, part.operation)
    if part.layers is not None:
        words.append(f"layers {spans(part.layers)}")
    if part.scope:
        words.append(f"@{part.scope}")
    if part.condition:
        words.append(f"@{part.condition}")
    if part.kind != STEERING:
        words.append(f"({part.kind})")
    return " ".join(words)


def _value(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, tuple):
        return spans(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def tensors_of(store: Store, change: PartChange) -> list[dict[str, Any]]:
    """Of a task vector that was replaced: per parameter the cosine of old and new, the ratio of norms, and the greatest
    change of an element. One parameter is read at a time; one that a side lacks counts as unchanged there."""
    if change.before is None or change.after is None or change.before.digest == change.after.digest:
        return []
    if not change.before.kind == change.after.kind == TASK:
        return []
    import numpy as np

    from vectors.task import TaskVector

    old, new = (TaskVector.open(blobs.path_of(store, part.digest)) for part in (change.before, change.after))
    rows = []
    for name in sorted({*old.parameters, *new.parameters}):
        shape = new.parameters.get(name) or old.parameters[name]
        if old.parameters.get(name, shape) != shape:
            rows.append({"parameter": name, "cosine": 0.0, "norm_ratio": 0.0, "max_change": float("inf")})
            continue
        zero = np.zeros(shape, np.float32)
        a, b = (
            each.delta(name).astype(np.float64).ravel() if name in each.parameters else zero.astype(np.float64).ravel()
            for each in (old, new)
        )
        lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        rows.append({
            "parameter": name, "cosine": float(a @ b) / (lengths[0] * lengths[1]) if all(lengths) else 0.0,
            "norm_ratio": lengths[1] / lengths[0] if lengths[0] else 0.0, "max_change": float(np.abs(b - a).max()),
        })  # fmt: skip
    return rows


def layers_of(store: Store, change: PartChange) -> list[dict[str, float]]:
    """Of a steering vector that was replaced: per layer the cosine of old and new, and the ratio of their norms."""
    if change.before is None or change.after is None or change.before.digest == change.after.digest:
        return []
    if not change.before.kind == change.after.kind == STEERING:
        return []
    from vectors.steering import SteeringVector

    old, new = (SteeringVector.load(blobs.path_of(store, part.digest)) for part in (change.before, change.after))
    norms = old.norm(), new.norm()
    return [
        {"layer": layer, "cosine": cosine, "norm_ratio": norms[1][layer] / norms[0][layer] if norms[0][layer] else 0.0}
        for layer, cosine in old.cosine(new).items()
    ]
