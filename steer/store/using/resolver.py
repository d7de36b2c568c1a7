"""Versions of the store as names in expressions: `1.2*warm + 'tone@champion'`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from steer.store import layout, names, refs
from steer.store.layout import Store
from steer.store.objects.model import TASK
from steer.store.using.realise import realise
from vectors.errors import UsageError
from vectors.expression import Composition, parse
from vectors.resolve import Compound, Resolver


class Version(NamedTuple):
    """A version as a composition over files of the store; `label` is its alias, tag or branch."""

    label: str
    base: str
    composition: Composition
    files: dict[str, Path]
    commit: str
    recipe: str  # the digest of the stored composition, to which evaluations are attached


def version_of(store: Store, text: str) -> Version:
    """The version that a text names. Raises UsageError for an unknown one, and for one that is in the weights.

    Two versions may hold different vectors of one name, so the names get the beginning of their digest behind.
    """
    found = realise(store, text)
    task = [part.name for part in found.personality.of_kind(TASK)]
    if task or found.expression is None:
        why = f"changes the weights by {', '.join(task)}" if task else "has no parts"
        raise UsageError(
            f"{text} {why}, so it is no composition of vectors",
            f"write its weights first, and use their folder: steer build {text} -o FOLDER" if task else "steer add",
        )
    digest_of = {part.name: part.digest for part in found.personality.parts}
    renamed = {name: f"{name}.{digest_of[name][7:13]}" for name in found.files}
    terms = tuple(
        replace(
            term,
            name=renamed[term.name],
            conditions=tuple(replace(each, name=renamed.get(each.name, each.name)) for each in term.conditions),
        )
        for term in parse(found.expression).terms
    )
    files = {renamed[name]: path for name, path in found.files.items()}
    ref = names.ref_of(store, text)
    label = (ref.label or ref.name) if ref is not None else names.short(found.commit)
    return Version(label, found.personality.base, Composition(terms), files, found.commit, found.composition)


def followed(store: Store, alias: str, version: Version) -> dict[str, str]:
    """What a server needs to follow an alias that stands for this version, as its settings have it."""
    return {
        "name": alias, "store": str(store.root), "work": str(store.work), "base": version.base,
        "commit": version.commit,
    }  # fmt: skip


def resolver(folder: Path | None = None) -> Resolver:
    """The versions of the store of a folder, by default the current one; there may be none."""

    def compound(text: str) -> Compound | None:
        store = layout.find(folder)
        if store is None or names.find(store, text) is None:
            return None
        version = version_of(store, text)
        return Compound(version.composition, version.files)

    def known() -> list[str]:
        store = layout.find(folder)
        return [] if store is None else [str(ref) for ref in refs.every(store)]

    return Resolver(lambda name: None, known, compound)
