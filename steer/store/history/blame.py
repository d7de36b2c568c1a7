"""The commit that last changed a part."""

from __future__ import annotations

from steer.store.history.walk import walk
from steer.store.layout import Store
from steer.store.objects.model import Commit, Part, read_commit, read_composition
from vectors.errors import UsageError, guess


def blame(store: Store, digest: str, part: str | None = None) -> dict[str, Commit]:
    """By part: the newest commit whose parents all hold another state of it. Raises UsageError for an unknown part."""
    states: dict[str, dict[str, Part]] = {}

    def parts_of(commit: Commit) -> dict[str, Part]:
        if commit.composition not in states:
            states[commit.composition] = {p.name: p for p in read_composition(store, commit.composition).parts}
        return states[commit.composition]

    now = parts_of(read_commit(store, digest))
    if part is not None and part not in now:
        raise UsageError(f"there is no part {part!r}{guess(part, now)}", f"the parts are {', '.join(now) or 'none'}")
    left = {part} if part is not None else set(now)
    found: dict[str, Commit] = {}
    for commit in walk(store, [digest]):
        before = [parts_of(read_commit(store, parent)) for parent in commit.parents]
        for name in sorted(left):
            state = now[name]
            if parts_of(commit).get(name) == state and all(each.get(name) != state for each in before):
                found[name] = commit
                left.discard(name)
        if not left:
            break
    return {name: found[name] for name in now if name in found}
