"""Three-way merges of part lists. Numbers are never averaged: where both sides changed one thing, it is a conflict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from steer.store.objects.model import Part, Personality

_MISSING = object()


class Merged(NamedTuple):
    """The merge, and what both sides changed differently: (part or setting, ours, theirs), as text."""

    personality: Personality
    conflicts: tuple[tuple[str, str, str], ...]


def merge(base: Personality, ours: Personality, theirs: Personality) -> Merged:
    """Both sides' changes since `base`. A conflict only where the same part or setting changed on both sides.

    The order is ours; parts that only they have follow the part that they follow there. A conflict keeps ours.
    """
    conflicts: list[tuple[str, str, str]] = []
    parts = _parts(base, ours, theirs, conflicts)
    settings: dict[str, Any] = {}
    for key in ("base", "base_digest", "evals"):
        settings[key] = _chosen(key, getattr(base, key), getattr(ours, key), getattr(theirs, key), conflicts)
    for key in ("merge", "serve"):
        of_base, of_ours, of_theirs = (getattr(each, key) for each in (base, ours, theirs))
        merged = {}
        for name in dict.fromkeys([*of_ours, *of_theirs]):
            three = [each.get(name, _MISSING) for each in (of_base, of_ours, of_theirs)]
            merged[name] = _chosen(f"{key}.{name}", three[0], three[1], three[2], conflicts)
        settings[key] = {name: value for name, value in merged.items() if value is not _MISSING}
    return Merged(replace(ours, parts=parts, **settings), tuple(conflicts))


def _parts(
    base: Personality, ours: Personality, theirs: Personality, conflicts: list[tuple[str, str, str]]
) -> tuple[Part, ...]:
    by_name = [{part.name: part for part in each.parts} for each in (base, ours, theirs)]
    before, mine, other = by_name
    chosen = {
        name: _chosen(name, before.get(name), mine.get(name), other.get(name), conflicts)
        for name in dict.fromkeys([*mine, *other])
    }
    # Their order, where they alone changed it.
    shared = [[name for name in each if all(name in other for other in by_name)] for each in by_name]
    order = list(by_name[1])
    if shared[1] == shared[0] != shared[2]:
        order = [name for name in by_name[2] if name in by_name[1]]
        order += [name for name in by_name[1] if name not in by_name[2]]
    elif shared[0] != shared[1] != shared[2] != shared[0]:
        conflicts.append(("the order of the parts", ", ".join(shared[1]), ", ".join(shared[2])))
    previous = ""
    for name in by_name[2]:
        if name not in order:
            order.insert(order.index(previous) + 1 if previous in order else len(order), name)
        previous = name
    return tuple(chosen[name] for name in order if chosen.get(name) is not None)


def _chosen(name: str, base: Any, ours: Any, theirs: Any, conflicts: list[tuple[str, str, str]]) -> Any:
    if ours == theirs or theirs == base:
        return ours
    if ours == base:
        return theirs
    conflicts.append((name, _text(ours), _text(theirs)))
    return ours


def _text(value: Any) -> str:
    if value is None or value is _MISSING:
        return "removed"
    if isinstance(value, Part):
        from steer.store.objects.card import entry_of

        return ", ".join(f"{key} {entry}" for key, entry in entry_of(value).items() if key != "name")
    return str(value)
