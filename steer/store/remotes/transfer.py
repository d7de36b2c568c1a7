"""Push and pull: versions, with everything that they need, to a remote and from one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from steer.store import blobs, referrers, refs
from steer.store.blobs import Descriptor
from steer.store.history.walk import ancestors, nodes
from steer.store.layout import Store
from steer.store.objects.model import (
    COMMIT,
    MANIFEST,
    TITLE,
    problems_of_commit,
    problems_of_manifest,
    read_manifest,
)
from steer.store.refs import Ref
from steer.store.remotes._protocol import SUBJECT, Object, Remote
from vectors.errors import ArtifactError, OutputError, UsageError, guess
from vectors.events import Event, OnEvent, ignore
from vectors.storage.files import digest_file
from vectors.storage.locks import temporary_folder


class Transferred(NamedTuple):
    """What a push or a pull moved: names to digests, and the objects and bytes that had to be sent."""

    names: dict[str, str]
    objects: int
    bytes: int


def push(store: Store, remote: Remote, name: str, *, force: bool = False, on_event: OnEvent = ignore) -> Transferred:
    """Send a branch with its tags and aliases, and what is attached to its versions.

    Raises OutputError where the remote has versions that are not here.

    Blobs first, then manifests with the oldest first, then the names: an interrupted push changes no name.
    """
    mine = {ref: digest for ref, digest in refs.every(store).items() if ref.name == name}
    if refs.branch(name) not in mine:
        known = [ref.name for ref in refs.every(store) if ref.kind == "branch"]
        raise UsageError(f"there is no branch {name}{guess(name, known)}", "steer log shows the branches")
    _require_distinct_labels(mine)
    theirs = remote.names()
    _require_forward(store, mine, theirs, force)
    manifests = {str(ref): list(_manifests(store, digest)) for ref, digest in mine.items()}
    objects: dict[str, Object] = {}
    for listed in manifests.values():
        for item in listed:
            for part in _blobs_of(store, item.digest):
                objects.setdefault(part.digest, part)
    for listed in manifests.values():
        for item in listed:
            objects.setdefault(item.digest, item)
    mine_attached = _attached(store, mine.values())
    for digest, each in mine_attached.items():
        for part in _blobs_of(store, digest):
            objects.setdefault(part.digest, part._replace(title=""))
        objects[digest] = Object(digest, each.size, MANIFEST, True)
    attached = remote.attached() | mine_attached
    missing = remote.missing(list(objects.values()))
    sent = sum(item.size for item in missing)
    for i, item in enumerate(missing):
        on_event(Event("sending", i, len(missing), "objects"))
        remote.put(item, blobs.path_of(store, item.digest))
    names = theirs | {str(ref): digest for ref, digest in mine.items()}
    if names != theirs or attached != remote.attached():
        commits = {
            key: [item for item in listed if _is_commit(store, item.digest)] for key, listed in manifests.items()
        }
        tip = mine[refs.branch(name)]
        files = {part.title: blobs.path_of(store, part.digest) for part in _blobs_of(store, tip) if part.title}
        remote.point(names, commits, files, attached)
    return Transferred({str(ref): digest for ref, digest in mine.items()}, len(missing), sent)


def pull(
    store: Store, remote: Remote, name: str, command: str, *, as_: str | None = None, force: bool = False,
    on_event: OnEvent = ignore,
) -> Transferred:  # fmt: skip
    """Fetch a branch with its tags and aliases, as a branch of this name or another, and what is attached.

    Every digest is checked before a name moves. Raises OutputError where the branch here has versions that the remote
    has not, ArtifactError for what is damaged.
    """
    theirs = {key: digest for key, digest in remote.names().items() if _name_of(key) == name}
    if name not in theirs:
        raise UsageError(
            f"the remote has no personality {name}", f"it has {', '.join(sorted(remote.names())) or 'none'}"
        )
    fetched = _fetch(store, remote, list(dict.fromkeys(theirs.values())), on_event)
    local = as_ or name
    targets: dict[Ref, str | None] = {}
    for key, digest in theirs.items():
        targets[_renamed(key, local)] = digest
    _require_forward(store, {ref: str(digest) for ref, digest in targets.items()}, _here(store, targets), force)
    more = _fetch_attached(store, remote, list(theirs.values()), on_event)
    fetched = fetched[0] + more[0], fetched[1] + more[1]
    refs.point(store, targets, command, force=force)
    return Transferred({str(ref): str(digest) for ref, digest in targets.items()}, *fetched)


def _fetch(store: Store, remote: Remote, tips: Sequence[str], on_event: OnEvent) -> tuple[int, int]:
    """Fetch everything that commits lead to; a manifest is stored only after all that it needs. Returns counts."""
    count = size = 0
    received: dict[str, bytes] = {}  # manifests, until all that they need is stored
    waiting = list(tips)
    while waiting:
        digest = waiting.pop()
        if blobs.has(store, digest):
            continue
        if digest not in received:
            received[digest], value = _manifest(store, remote, Object(digest, 0, MANIFEST, True))
            for part in (value["config"], *value["layers"]):
                described = Object(part["digest"], part["size"], part["mediaType"], False)
                if not blobs.has(store, described.digest):
                    on_event(Event("fetching", count, count + len(waiting) + 1, "objects"))
                    _store_blob(store, remote, described)
                    count, size = count + 1, size + described.size
            before = _parents(store, digest, value) if value.get("artifactType") == COMMIT else []
            subject = (value.get("subject") or {}).get("digest")
            needed = [each for each in [*before, subject] if each and not blobs.has(store, each)]
            if needed:
                waiting += [digest, *needed]
                continue
        blobs.put_bytes(store, received.pop(digest))
        read_manifest(store, digest)
        count += 1
    return count, size


def _attached(store: Store, tips: Iterable[str]) -> dict[str, Descriptor]:
    """What is attached to the versions behind these commits, by digest."""
    compositions = dict.fromkeys(node.composition for node in nodes(store, list(dict.fromkeys(tips))))
    return {
        each.digest: Descriptor(
            MANIFEST, each.digest, blobs.path_of(store, each.digest).stat().st_size, {SUBJECT: composition}
        )
        for composition in compositions
        for each in referrers.of(store, composition)
    }


def _fetch_attached(store: Store, remote: Remote, tips: Sequence[str], on_event: OnEvent) -> tuple[int, int]:
    """Fetch what is attached to the versions behind these commits, which are here; each is checked to refer to it."""
    compositions = {node.composition for node in nodes(store, tips)}
    count = size = 0
    for digest, described in remote.attached().items():
        composition = described.annotations[SUBJECT]
        if composition not in compositions:
            continue
        if not blobs.has(store, digest):
            content, value = _manifest(store, remote, Object(digest, described.size, MANIFEST, True))
            for part in (value["config"], *value["layers"]):
                described_part = Object(part["digest"], part["size"], part["mediaType"], False)
                if not blobs.has(store, described_part.digest):
                    on_event(Event("fetching", count, None, "objects"))
                    _store_blob(store, remote, described_part)
                    count, size = count + 1, size + described_part.size
            blobs.put_bytes(store, content)
            count += 1
        if (read_manifest(store, digest).get("subject") or {}).get("digest") != composition:
            raise ArtifactError(f"{digest} of the remote does not refer to {composition}", "push again")
        referrers.remember(store, composition, digest)
    return count, size


def _manifest(store: Store, remote: Remote, item: Object) -> tuple[bytes, dict[str, Any]]:
    """A manifest of the remote, checked and not stored: its bytes and its value."""
    from vectors.documents import json_text

    with temporary_folder(store.root / "incoming") as folder:
        target = folder / "manifest"
        remote.get(item, target)
        if target.stat().st_size > blobs.LARGEST_DOCUMENT or digest_file(target) != item.digest:
            raise _damaged(item)
        content = target.read_bytes()
        try:
            value = json_text.parse(content, unique=True)
        except ValueError as error:
            raise ArtifactError(
                f"the manifest {item.digest} of the remote is damaged: {error}", "push again"
            ) from error
    problems = problems_of_manifest(value)
    if problems:
        raise ArtifactError(f"the manifest {item.digest} of the remote is damaged: {problems[0]}", "push again")
    return content, value


def _parents(store: Store, digest: str, manifest: dict[str, Any]) -> list[str]:
    """The commits before a commit whose config is stored. Raises ArtifactError."""
    config = blobs.read_json(store, manifest["config"]["digest"])
    problems = problems_of_commit(config)
    if problems:
        raise ArtifactError([f"{digest} of the remote: {problem}" for problem in problems], "push again")
    return [*config["parents"]]


def _store_blob(store: Store, remote: Remote, item: Object) -> None:
    with temporary_folder(store.root / "incoming") as folder:
        target = folder / "blob"
        remote.get(item, target)
        if digest_file(target) != item.digest:
            raise _damaged(item)
        blobs.put_file(store, target, item.digest)


def _damaged(item: Object) -> ArtifactError:
    return ArtifactError(f"the remote sent other bytes than {item.digest}", "the remote is damaged: push to it again")


def _manifests(store: Store, tip: str) -> Iterator[Object]:
    """The manifests that a commit leads to, oldest commit first, each behind its composition."""
    for commit in reversed(list(nodes(store, [tip]))):
        for digest in (commit.composition, commit.digest):
            yield Object(digest, blobs.path_of(store, digest).stat().st_size, MANIFEST, True)


def _blobs_of(store: Store, digest: str) -> Iterator[Object]:
    value = read_manifest(store, digest)
    for part in (value["config"], *value["layers"]):
        title = (part.get("annotations") or {}).get(TITLE, "")
        yield Object(part["digest"], part["size"], part["mediaType"], False, title)


def _is_commit(store: Store, digest: str) -> bool:
    return read_manifest(store, digest).get("artifactType") == COMMIT


def _require_forward(store: Store, new: dict[Ref, str], old: dict[str, str], force: bool) -> None:
    """Refuse to lose versions: a branch moves to a descendant alone, a tag not at all. Raises OutputError with all."""
    problems = []
    for ref, digest in new.items():
        before = old.get(str(ref))
        if before in (None, digest) or force:
            continue
        if ref.kind == "tag":
            problems.append(f"the tag {ref} is {before} there, and {digest} here")
        elif ref.kind == "branch" and before not in ancestors(store, digest):
            problems.append(f"the branch {ref} has versions that the other side has not ({str(before)[:15]}…)")
    if problems:
        raise OutputError(
            problems, "pull them under another name and merge: steer pull REMOTE NAME --as NAME-theirs; or --force"
        )


def _require_distinct_labels(mine: dict[Ref, str]) -> None:
    labels = [ref.label for ref in mine if ref.label]
    both = sorted({label for label in labels if labels.count(label) > 1 or label in ("latest", "steer-names")})
    if both:
        raise OutputError(
            [f"{label} is a tag and an alias, or a name that a registry needs for itself" for label in both],
            "rename the tag: steer tag NEW OLD; steer tag OLD --delete",
        )


def _here(store: Store, targets: dict[Ref, str | None]) -> dict[str, str]:
    """Where the names point here; a branch that is behind the remote may move forward, which the caller checks."""
    found = {str(ref): refs.target(store, ref) for ref in targets}
    return {key: digest for key, digest in found.items() if digest is not None}


def _name_of(key: str) -> str:
    return key.partition("@")[0].partition(":")[0]


def _renamed(key: str, name: str) -> Ref:
    if "@" in key:
        return refs.alias(name, key.partition("@")[2])
    return refs.tag(name, key.partition(":")[2]) if ":" in key else refs.branch(name)
