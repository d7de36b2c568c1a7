"""Whether a store is whole: every blob has its digest, every name leads to a commit, and every part is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from steer.store import blobs, layout, referrers, refs
from steer.store.history import graph
from steer.store.layout import Store
from steer.store.objects.model import COMMIT, COMPOSITION, read_commit, read_composition, read_manifest
from vectors.documents import json_text
from vectors.errors import ArtifactError, SteerError
from vectors.events import Event, OnEvent, ignore
from vectors.storage.files import digest_file


class Verified(NamedTuple):
    """What was checked, and every problem with the name of what is damaged."""

    blobs: int
    bytes: int
    commits: int
    problems: tuple[str, ...]


def verify(store: Store, on_event: OnEvent = ignore) -> Verified:
    """Hash every blob again and follow every name. A blob's problem names the blob and what leads to it."""
    problems: list[str] = []
    with contextlib.suppress(SteerError), layout.changing(store):  # what a killed process began; not on a full disk
        refs.complete(store)
    digests = sorted(blobs.every(store))
    size = 0
    damaged = set()
    for i, digest in enumerate(digests):
        on_event(Event("hashing", i, len(digests), "blobs"))
        path = blobs.path_of(store, digest)
        try:
            actual = digest_file(path)
            size += path.stat().st_size
        except OSError as error:
            problems.append(f"the blob {digest} can't be read: {error.strerror}")
            damaged.add(digest)
            continue
        if actual != digest:
            problems.append(f"the blob {digest} is damaged: its content is {actual}")
            damaged.add(digest)
    with os.scandir(store.blobs) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and not blobs.DIGEST.fullmatch(f"sha256:{entry.name}"):
                problems.append(f"{entry.path} is no blob: its name is no digest")
    problems += _problems_of_files(store)
    commits = _commits(store, problems, damaged)
    problems += _problems_of_referrers(store)
    problems += graph.problems(store, commits)
    return Verified(len(digests), size, len(commits), tuple(problems))


def _problems_of_files(store: Store) -> Iterator[str]:
    """Of the files beside the blobs."""
    try:
        index = json_text.read_object(store.root / "index.json", ArtifactError, "steer verify")
        listed = {
            each.get("annotations", {}).get("org.opencontainers.image.ref.name"): each.get("digest")
            for each in index.get("manifests", [])
        }
        names = {str(ref): digest for ref, digest in refs.every(store).items()}
        for name in sorted({str(each) for each in {*listed, *names} if listed.get(each) != names.get(each)}):
            yield f"index.json and the name {name} differ"
    except (SteerError, AttributeError, TypeError) as error:
        yield f"index.json is damaged: {error}"
    try:
        refs.current(store)
    except SteerError as error:
        yield from error.problems
    try:
        yield from refs.problems_of_record(store)
    except SteerError as error:
        yield from error.problems


def _commits(store: Store, problems: list[str], damaged: set[str]) -> set[str]:
    """Follow every name, now and before, through all commits, compositions and parts."""
    try:
        tips = {digest: f"the name {ref}" for ref, digest in refs.every(store).items()}
    except SteerError as error:
        problems += error.problems
        return set()
    try:
        for digest in refs.pointed_at(refs.entries(store)):
            if blobs.has(store, digest):  # what only an undone move led to may have been collected
                tips.setdefault(digest, "a name that has moved")
    except SteerError:
        pass  # listed already
    seen: set[str] = set()
    waiting = list(tips.items())
    while waiting:
        digest, reason = waiting.pop()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            manifest = read_manifest(store, digest, COMMIT)
            commit = read_commit(store, digest)
            composition = read_manifest(store, commit.composition, COMPOSITION)
            read_composition(store, commit.composition)
        except SteerError as error:
            problems += [
                f"{problem} ({reason} leads to it)"
                for problem in error.problems
                if not any(d in problem for d in damaged)
            ]
            continue
        for layer in [*manifest["layers"], *composition["layers"]]:
            if not blobs.has(store, layer["digest"]):
                problem = f"the blob {layer['digest']} is missing (the commit {digest} needs it)"
                if problem not in problems:
                    problems.append(problem)
        waiting += [(parent, f"the commit {digest}") for parent in commit.parents]
    return seen


def _problems_of_referrers(store: Store) -> Iterator[str]:
    """Of evaluations, reports and signatures that are attached to compositions."""
    for composition, digests in referrers.every(store).items():
        if not blobs.has(store, composition):
            continue  # collected, with what referred to it
        for digest in digests:
            try:
                value = read_manifest(store, digest)
            except SteerError as error:
                yield from (f"{problem} (it is attached to {composition})" for problem in error.problems)
                continue
            if (value.get("subject") or {}).get("digest") != composition:
                yield f"{digest} is listed as attached to {composition}, but does not refer to it"
            for layer in value["layers"]:
                if not blobs.has(store, layer["digest"]):
                    yield f"the blob {layer['digest']} is missing (attached to {composition})"
