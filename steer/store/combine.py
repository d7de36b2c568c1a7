"""Commits that follow from other commits: a merge of two branches, and the reversal of one commit."""

from __future__ import annotations

from typing import NamedTuple

from steer.store import refs
from steer.store.history.differences import compare
from steer.store.history.merging import Merged, merge
from steer.store.history.walk import merge_base
from steer.store.layout import Store
from steer.store.objects.card import entry_of
from steer.store.objects.model import Commit, Personality, read_commit, read_composition
from steer.store.working import checkout, document, folder
from vectors.errors import OutputError, UsageError
from vectors.storage.files import digest_file


class Result(NamedTuple):
    """The commit to which the branch moved; None where there was nothing to do. `forward`: without a new commit."""

    commit: Commit | None
    forward: bool = False


def merge_commit(
    store: Store, theirs: str, name: str, message: str, command: str, *, take: str | None = None
) -> Result:
    """Merge a commit into the current branch. `take` settles conflicts: "ours" or "theirs".

    Raises OutputError with every conflict, before anything is changed; UsageError where there is no commit to merge.
    """
    checkout.require_clean(store)
    branch = refs.branch(refs.current(store))
    ours = refs.target(store, branch)
    if ours is None:
        raise UsageError(f"the branch {branch} has no commit to merge into", f"take the other: steer checkout {name}")
    base = merge_base(store, ours, theirs)
    if base == theirs:
        return Result(None)
    if base == ours:
        checkout.restore(store, theirs)
        refs.point(store, {branch: theirs}, command, expected={branch: ours})
        return Result(read_commit(store, theirs), forward=True)
    sides = [_composition(store, digest) for digest in (ours, theirs)]
    of_base = _composition(store, base) if base else Personality(sides[0].base, sides[0].base_digest)
    merged = merge(of_base, *sides)
    if merged.conflicts and take == "theirs":
        merged = merge(of_base, sides[1], sides[0])
    if merged.conflicts and take is None:
        raise conflicts_of(merged, name, f"choose a side: steer merge {name} --take ours, or --take theirs")
    return Result(_committed(store, sides[0], merged.personality, message or f"Merge {name}", command, (theirs,)))


def revert(store: Store, digest: str, message: str, command: str) -> Commit:
    """A commit that takes back what one commit changed, and keeps what came after it.

    Raises OutputError where something that it changed was changed again since; UsageError for the first commit.
    """
    checkout.require_clean(store)
    undone = read_commit(store, digest)
    if not undone.parents:
        raise UsageError(f"{digest} is the first commit, which has nothing before it", "choose a later commit")
    tip = refs.target(store, refs.branch(refs.current(store)))
    if tip is None:
        raise UsageError("the current branch has no commit", "steer checkout NAME")
    now = _composition(store, tip)
    merged = merge(_composition(store, digest), now, _composition(store, undone.parents[0]))
    if merged.conflicts:
        raise conflicts_of(merged, "before it", "edit personality.yaml by hand, then commit")
    if not compare(now, merged.personality):
        raise UsageError("nothing of that commit is left to take back", "steer diff shows what differs")
    text = message or f'Revert "{undone.title}"\n\nThis takes back {digest}.'
    return _committed(store, now, merged.personality, text, command, ())


def conflicts_of(merged: Merged, name: str, hint: str) -> OutputError:
    """The error for a merge with conflicts: one problem for each."""
    return OutputError(
        [f"{what} changed on both sides: here {ours}; {name} {theirs}" for what, ours, theirs in merged.conflicts], hint
    )


def updated_document(store: Store, before: Personality, after: Personality) -> str:
    """The text of `personality.yaml` edited from one composition to another, with its comments.

    Raises ArtifactError.
    """
    difference = compare(before, after)
    changes: list[document.Change] = []
    for each in difference.parts:
        if each.after is None:
            changes.append(document.without_part(each.name))
            continue
        entry = entry_of(each.after)
        changed = {field for field, _, _ in each.fields} or set(entry)
        fields = {key: entry.get(key) for key in ("strength", "operation", "layers", "scope", "condition")}
        fields = {key: value for key, value in fields.items() if key in changed}
        if "digest" in changed:
            beside = store.work / f"{each.name}.safetensors"
            is_beside = beside.is_file() and digest_file(beside) == each.after.digest
            fields |= {"digest": None if is_beside else each.after.digest, "path": None}
        changes.append(document.with_part(each.name, fields))
    changes.append(document.in_order([part.name for part in after.parts]))
    changes += [document.with_field(tuple(key.split(".", 1)), new) for key, _, new in difference.settings]
    content = document.content_of(store.file)
    for change in changes:
        content = document.edited(content, change, str(store.file))
    return content


def _committed(
    store: Store, before: Personality, after: Personality, message: str, command: str, parents: tuple[str, ...]
) -> Commit:
    """The commit first, then the file: a kill between the two is a difference that `steer status` shows."""
    content = updated_document(store, before, after)
    made = folder.commit(store, message, command, parents=parents, content=content)
    document.write(store.file, content)
    return made


def _composition(store: Store, commit: str) -> Personality:
    return read_composition(store, read_commit(store, commit).composition)
