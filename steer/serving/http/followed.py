"""Arms that stand for an alias of a store, such as tone@champion: when it moves, new conversations get the new version.

A conversation that runs keeps the version that it began with, as long as this process remembers it: the last 100,000
conversations, and the last eight versions of an arm. A version that can't be served (another base, a damaged blob) is
reported, and the arm stays what it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steer.serving.engine import frontend_hooks
from steer.serving.engine.resolved import names_of
from vectors.errors import SteerError, UsageError
from vectors.steering import SteeringVector
from vectors.storage.files import digest_json

if TYPE_CHECKING:
    from steer.serving.engine.admission import Admission

INTERVAL = 1.0  # seconds between two readings of an alias: a small file each
CONVERSATIONS = 100_000
VERSIONS = 8

_log = logging.getLogger("steer")


class Version(NamedTuple):
    """A version that an arm has been: its commit, and its expression over vectors of the server.

    `vectors` are all that it needs, those that only a condition reads among them.
    """

    commit: str
    expression: str
    vectors: tuple[str, ...]


@dataclass
class Followed:
    """An arm that follows an alias. `store` is the folder of the store, `work` the working folder beside it."""

    arm: str
    name: str
    store: Path
    work: Path
    base: str
    current: Version
    versions: OrderedDict[str, Version] = field(default_factory=OrderedDict)  # by commit, oldest first
    conversations: OrderedDict[str, str] = field(default_factory=OrderedDict)  # commits, by a hash of the conversation
    problem: tuple[str, str] | None = None  # a commit that the alias moved to and that can't be served, and why

    def __post_init__(self) -> None:
        self.versions[self.current.commit] = self.current

    def version_for(self, conversation: str, begins: bool) -> Version:
        """The version of a conversation: the one that it began with, or the present one where it is new."""
        key = digest_json(["conversation", conversation])[7:39]
        known = None if begins else self.versions.get(self.conversations.get(key, ""))
        version = known or self.current
        self.remember(conversation, version)
        return version

    def remember(self, conversation: str, version: Version) -> None:
        """Let a conversation (or the answer that it may be continued from, by its id) have a version from now on."""
        key = digest_json(["conversation", conversation])[7:39]
        self.conversations[key] = version.commit
        self.conversations.move_to_end(key)
        if len(self.conversations) > CONVERSATIONS:
            self.conversations.popitem(last=False)

    def value(self) -> dict[str, Any]:
        """What GET /steer says about it."""
        problem = None if self.problem is None else {"commit": self.problem[0], "problem": self.problem[1]}
        return {"name": self.name, "commit": self.current.commit, "problem": problem}


def begin(settings: Mapping[str, Mapping[str, str]], admission: Admission) -> dict[str, Followed]:
    """The arms that follow an alias, as the settings describe them, by name."""
    return {
        arm: Followed(
            arm, each["name"], Path(each["store"]), Path(each["work"]), each["base"],
            Version(each["commit"], str(admission.arms[arm]), names_of(admission.arms[arm])),
        )
        for arm, each in settings.items()
    }  # fmt: skip


async def follow(engine: Any, followed: Mapping[str, Followed]) -> None:
    """Look every second whether an alias has moved. Ends with the task."""
    while True:
        await asyncio.sleep(INTERVAL)
        for each in followed.values():
            try:
                await update(engine, each)
            except Exception:  # one arm's failure must not end the others'
                _log.exception("the arm %s can't be followed", each.arm)


async def update(engine: Any, each: Followed) -> None:
    """Let an arm become what its alias points to now."""
    try:
        commit = await asyncio.to_thread(_target, each)
    except SteerError as error:
        _report(each, "", "; ".join(error.problems))
        return
    if commit in (None, each.current.commit) or (each.problem and each.problem[0] == commit):
        if commit == each.current.commit:
            each.problem = None
        return
    try:
        await _switch(engine, each, str(commit))
    except (SteerError, ValueError) as error:
        _report(each, str(commit), "; ".join(getattr(error, "problems", [str(error)])))


def _target(each: Followed) -> str | None:
    from steer.store import names
    from steer.store.layout import Store

    return names.find(Store(each.store, each.work), each.name)


def _loaded(each: Followed, commit: str) -> tuple[str, dict[str, SteeringVector]]:
    from steer.store.layout import Store
    from steer.store.using.resolver import version_of

    version = version_of(Store(each.store, each.work), commit)
    if version.base != each.base:
        raise UsageError(f"it has the base {version.base}, and {each.base} is served", "start the server again")
    return str(version.composition), {name: SteeringVector.load(file) for name, file in version.files.items()}


async def _switch(engine: Any, each: Followed, commit: str) -> None:
    """Send the version's vectors to the workers first, and let the arm be the new version last."""
    expression, vectors = await asyncio.to_thread(_loaded, each, commit)
    admission = frontend_hooks.admission_of(engine.input_processor)
    new = [name for name in vectors if name not in admission.bound]
    try:
        for name in new:
            await frontend_hooks.bind(engine, name, vectors[name])
        composition = admission.replace_arm(each.arm, expression)
    except BaseException:
        for name in new:
            if name in admission.bound:
                frontend_hooks.unbind(engine, name)
        raise
    each.current = Version(commit, str(composition), tuple(vectors))
    each.versions.pop(commit, None)
    each.versions[commit], each.problem = each.current, None
    _log.info("the arm %s is the version %s of %s for new conversations", each.arm, commit[7:15], each.name)
    if len(each.versions) > VERSIONS:
        _, oldest = each.versions.popitem(last=False)
        needed = {name for version in each.versions.values() for name in version.vectors}
        for name in set(oldest.vectors) - needed:
            try:
                frontend_hooks.unbind(engine, name)
            except SteerError:  # another arm needs it
                continue


def _report(each: Followed, commit: str, why: str) -> None:
    if each.problem != (commit, why):
        each.problem = commit, why
        _log.warning("%s moved to a version that can't be served, so the arm %s stays: %s", each.name, each.arm, why)
