"""The parts that `personality.yaml` names: where they are, what they hold, by their headers alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steer.store import blobs, refs
from steer.store.layout import Store
from steer.store.objects.model import STEERING, TASK, Part, Personality, read_commit, read_composition
from steer.store.working import document
from steer.store.working.document import Document, Entry
from vectors import artifact
from vectors.documents import json_text
from vectors.documents.schema import excerpt
from vectors.errors import ArtifactError, ModelError, SteerError, UsageError, collecting, guess, raise_together
from vectors.storage.files import canonical_json, digest_file, write_atomically
from vectors.weights import read_header

KINDS = {"steering-vector": STEERING, "task-vector": TASK}  # by the kind in a file's metadata
# The operations whose number no vector recommends, with what it is.
WITHOUT_DEFAULT = {"rotate": "the degrees to turn by", "share": "a percentage of the norm"}


class Found(NamedTuple):
    """A part of the working folder: the part, and its file where it is not in the store alone."""

    part: Part
    file: Path | None
    base: Mapping[str, Any]  # the identity of the model that it was made from


class Described(NamedTuple):
    """What the header of a vector's file says."""

    kind: str
    strength: float  # recommended; 1 where nothing is
    base: Mapping[str, Any]


def describe(file: Path) -> Described:
    """What a vector's file is, by its header. Raises ArtifactError, UsageError."""
    if not file.is_file():
        raise UsageError(f"there is no file {file}", "check the path, or make it with steer extract or steer diff")
    metadata = artifact.metadata_of(read_header(file)[1], file)
    kind = KINDS.get(str((metadata or {}).get("kind", "steering-vector" if metadata else "")))
    if metadata is None or kind is None:
        found = "a file of another tool" if metadata is None else f"of the kind {excerpt(metadata.get('kind'))}"
        raise ArtifactError(
            f"{file} is {found}, not a steering vector or a task vector", "convert it: steer vectors convert"
        )
    recommended = metadata.get("recommended")
    strength = recommended.get("strength") if isinstance(recommended, dict) and kind == STEERING else None
    base = metadata.get("base")
    return Described(
        kind, float(strength) if isinstance(strength, int | float) else 1.0, base if isinstance(base, dict) else {}
    )


def require_readable(file: Path, kind: str) -> None:
    """Read a vector's file whole, with all its checks. Raises ArtifactError."""
    from vectors.steering import SteeringVector
    from vectors.task import TaskVector

    if kind == TASK:
        TaskVector.open(file)
    else:
        SteeringVector.load(file)


def require_stored(store: Store, found: list[Found]) -> None:
    """Store the parts that are not in the store yet, each read whole with all its checks. Raises ArtifactError."""
    for each in found:
        if each.file is not None and not blobs.has(store, each.part.digest):
            require_readable(each.file, each.part.kind)
            blobs.put_file(store, each.file, each.part.digest)


def read(store: Store) -> tuple[Personality, list[Found]]:
    """The composition that the working folder stands for. Raises one error with all its problems."""
    return realised(store, document.read(store.file))


def realised(
    store: Store, written: Document, *, pinned: Mapping[str, str] | None = None
) -> tuple[Personality, list[Found]]:
    """The composition of a document, and where its parts are.

    A part is its `digest`, else its `path`, else NAME.safetensors beside the document, else the part of that name in
    the newest commit (`pinned`: names to digests). Raises ArtifactError, UsageError with all problems.
    """
    errors: list[SteerError] = []
    found: list[Found] = []
    if pinned is None:
        pinned = {part.name: part.digest for part in _committed_parts(store)}
    with Digests(store) as digests:
        for entry in written.parts:
            with collecting(errors):
                found.append(_part(store, entry, pinned, digests))
    with collecting(errors):
        _require_bases(found, written)
    raise_together(errors)
    personality = Personality(
        written.base, written.base_digest, tuple(each.part for each in found), dict(written.merge), dict(written.serve),
        tuple(dict(each) for each in written.evals),
    )  # fmt: skip
    if personality.of_kind(STEERING):
        personality.expression()  # refused here rather than when it is served
    return personality, found


class Digests:
    """The digests of files, remembered by size, time and inode, so that large files are hashed once."""

    def __init__(self, store: Store) -> None:
        self.path = store.root / "files.json"
        self.entries: dict[str, Any] = {}
        self.changed = False

    def __enter__(self) -> Digests:
        if self.path.is_file():
            try:
                self.entries = json_text.read_object(self.path, ArtifactError, "")
            except ArtifactError:  # it only saves time
                self.entries = {}
        return self

    def __exit__(self, *_: object) -> None:
        if self.changed:
            recent = dict(list(self.entries.items())[-1000:])
            write_atomically(self.path, canonical_json(recent).encode())

    def of(self, file: Path) -> tuple[str, int]:
        """The digest and the size of a file. Raises ArtifactError."""
        key = str(file.resolve())
        try:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            known = self.entries.get(key)
            # A file changed within the last seconds could change again within one tick of its clock.
            settled = time.time_ns() - status.st_mtime_ns > 2_000_000_000
            if isinstance(known, list) and len(known) == 4 and known[:3] == stamp and settled:
                return str(known[3]), status.st_size
            digest = digest_file(file)
        except OSError as error:
            raise ArtifactError(f"{file} can't be read: {error.strerror or error}", "check the path") from error
        if settled:
            self.entries[key], self.changed = [*stamp, digest], True
        return digest, status.st_size


def _part(store: Store, entry: Entry, pinned: Mapping[str, str], digests: Digests) -> Found:
    file: Path | None = None
    if entry.digest is not None:
        digest = entry.digest
        beside = store.work / (entry.path or f"{entry.name}.safetensors")
        if not blobs.has(store, digest):
            if not beside.is_file() or digests.of(beside)[0] != digest:
                raise UsageError(
                    f"the part {entry.name} is {digest}, which is not in the store", "pull it, or remove its digest"
                )
            file = beside
    else:
        file = store.work / (entry.path or f"{entry.name}.safetensors")
        if file.is_file():
            digest = digests.of(file)[0]
        elif entry.path is None and entry.name in pinned and blobs.has(store, pinned[entry.name]):
            digest, file = pinned[entry.name], None
        else:
            near = [path.stem for path in store.work.glob("*.safetensors")] + list(pinned)
            raise UsageError(
                f"there is no {file.name} for the part {entry.name}{guess(entry.name, near)}",
                f"add its file: steer add FILE --name {entry.name}",
            )
    source = file or blobs.path_of(store, digest)
    described = describe(source)
    kind = described.kind
    # A recommended strength is one of an addition; an ablation of 1 removes the whole component.
    recommended = 1.0 if entry.operation in ("ablate", "mean_ablate") else described.strength
    if entry.strength is None and entry.operation in WITHOUT_DEFAULT:
        what = WITHOUT_DEFAULT[entry.operation]
        raise UsageError(
            f"the part {entry.name} has the operation {entry.operation} and no strength, which is {what}",
            f"set it: steer set {entry.name}.strength=10",
        )
    strength = entry.strength if entry.strength is not None else recommended
    size = source.stat().st_size
    part = Part(entry.name, digest, size, kind, strength, entry.operation, entry.layers, entry.scope, entry.condition)
    if kind == TASK and (entry.operation != "add" or entry.layers or entry.scope or entry.condition):
        raise UsageError(
            f"the part {entry.name} is a task vector, which has a strength alone",
            "remove its layers, scope, condition and operation",
        )
    return Found(part, file, described.base)


def _require_bases(found: list[Found], written: Document) -> None:
    """Refuse vectors of different models: their digests of the base are compared, where they are known."""
    bases: dict[str, list[str]] = {}
    for each in found:
        if isinstance(each.base.get("digest"), str):
            bases.setdefault(each.base["digest"], []).append(each.part.name)
    if written.base_digest:
        bases.setdefault(written.base_digest, []).append("base_digest of personality.yaml")
    if len(bases) > 1:
        listed = "; ".join(f"{', '.join(names)}: {digest[:23]}…" for digest, names in bases.items())
        raise ModelError(f"the parts were made from different models: {listed}", "use vectors of one model")


def _committed_parts(store: Store) -> tuple[Part, ...]:
    tip = refs.target(store, refs.branch(refs.current(store)))
    return read_composition(store, read_commit(store, tip).composition).parts if tip else ()
