"""Names: branches, tags and aliases, and the record of their moves, by which each can be undone.

A move is written to `moves.jsonl` first, and then to the names' files. A process that dies between leaves the last
entry half done; whoever next changes the store completes it. So a name never points to what was not recorded.
"""

from __future__ import annotations

import getpass
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steer.store import blobs, layout
from steer.store.history import graph
from steer.store.layout import Store
from vectors.documents import json_text
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.files import append_line, canonical_json, digest_json, write_atomically

Kind = Literal["branch", "tag", "alias", "HEAD"]

NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")  # a repository's name in an OCI registry
LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # a tag in an OCI registry
LONGEST = 100  # characters of a name
_FOLDERS = {"branch": "heads", "tag": "tags", "alias": "aliases"}
_SIGNS = {"tag": ":", "alias": "@"}


class Ref(NamedTuple):
    """A name: of a branch, or a tag or an alias (`label`) of a personality (`name`); or HEAD, which names a branch."""

    kind: Kind
    name: str = ""
    label: str = ""

    def __str__(self) -> str:
        return self.name + (_SIGNS[self.kind] + self.label if self.kind in _SIGNS else "") or "HEAD"


HEAD = Ref("HEAD")


class Move(NamedTuple):
    """A name and what it points to before and after: a commit's digest (HEAD: a branch's name), or None for nothing."""

    ref: Ref
    old: str | None
    new: str | None


class Entry(NamedTuple):
    """What one command moved; `number` counts from 1, `undoes` is the number of the entry that it undid."""

    number: int
    time: float
    author: str
    command: str
    moves: tuple[Move, ...]
    undoes: int | None = None
    check: str = ""  # a digest of this entry and of all before it


def branch(name: str) -> Ref:
    """A branch. Raises UsageError for a name that no registry would take."""
    return Ref("branch", _valid(name, NAME, "name", "lower-case letters, digits, and single . _ - between them"))


def tag(name: str, label: str) -> Ref:
    """A tag of a personality. Raises UsageError."""
    return Ref("tag", branch(name).name, _valid(label, LABEL, "tag", "letters, digits, _ . and -"))


def alias(name: str, label: str) -> Ref:
    """An alias of a personality, such as champion. Raises UsageError."""
    return Ref("alias", branch(name).name, _valid(label, LABEL, "alias", "letters, digits, _ . and -"))


def current(store: Store) -> str:
    """The name of the branch that commits go to. Raises ArtifactError."""
    text = _read(store.root / "HEAD")
    if text is None or not NAME.fullmatch(text):
        raise ArtifactError(f"{store.root / 'HEAD'} names no branch", "check the store: steer verify")
    return text


def target(store: Store, ref: Ref) -> str | None:
    """The digest of the commit that a name points to (of HEAD, the branch's name); None if there is no such name."""
    text = _read(path_of(store, ref))
    if text is not None and ref.kind != "HEAD" and not blobs.DIGEST.fullmatch(text):
        raise ArtifactError(f"the name {ref} holds {text[:80]!r}, not a digest", "check the store: steer verify")
    return text


def every(store: Store) -> dict[Ref, str]:
    """All names and the digests that they point to, in alphabetical order."""
    found: dict[Ref, str] = {}
    for kind, folder in _FOLDERS.items():
        root = store.root / "refs" / folder
        for path in sorted(root.glob("*" if kind == "branch" else "*/*")):
            parts = path.relative_to(root).parts
            if path.name.startswith(".") or not NAME.fullmatch(parts[0]) or not path.is_file():
                continue
            ref = Ref(kind, *parts)  # type: ignore[arg-type]
            digest = target(store, ref)
            if digest is not None:
                found[ref] = digest
    return found


def path_of(store: Store, ref: Ref) -> Path:
    """The file of a name."""
    if ref.kind == "HEAD":
        return store.root / "HEAD"
    folder = store.root / "refs" / _FOLDERS[ref.kind] / ref.name
    return folder / ref.label if ref.label else folder


def point(
    store: Store, targets: Mapping[Ref, str | None], command: str, *, expected: Mapping[Ref, str | None] | None = None,
    force: bool = False, undoes: int | None = None,
) -> Entry:  # fmt: skip
    """Point names to commits, all of them or none, and record it. None removes a name.

    `expected` are targets as the caller has seen them: if another process has moved one meanwhile, nothing is moved. A
    tag that exists is moved with `force` alone. Raises OutputError.
    """
    with layout.changing(store):
        return point_while_changing(store, targets, command, expected=expected, force=force, undoes=undoes)


def point_while_changing(
    store: Store, targets: Mapping[Ref, str | None], command: str, *, expected: Mapping[Ref, str | None] | None = None,
    force: bool = False, undoes: int | None = None,
) -> Entry:  # fmt: skip
    """`point` for a caller that is inside of `layout.changing` already."""
    complete(store)
    now = {ref: target(store, ref) for ref in targets}
    for ref, old in (expected or {}).items():
        if target(store, ref) != old:
            raise OutputError(
                f"{ref} was moved by another process meanwhile", "look at it (steer log), then run this again"
            )
    for ref, new in targets.items():
        if ref.kind == "tag" and now[ref] is not None and new != now[ref] and not force and undoes is None:
            raise OutputError(f"the tag {ref} exists: it is {now[ref]}", "choose another tag, or move it: --force")
    last = _last(store)
    entry = Entry(
        last.number + 1 if last else 1, time.time(), author(), command,
        tuple(Move(ref, now[ref], new) for ref, new in targets.items() if now[ref] != new), undoes,
    )  # fmt: skip
    if entry.moves or undoes is not None:
        graph.remember(store, [each.new for each in entry.moves if each.new and each.ref != HEAD])
        value = _value(entry)
        line = value | {"check": _check(last.check if last else "", value)}
        append_line(store.root / "moves.jsonl", canonical_json(line).encode())
        complete(store, entry)
    return entry


def entries(store: Store) -> list[Entry]:
    """The record of all moves, oldest first. A last line that a kill cut off was never done. Raises ArtifactError."""
    try:
        content = (store.root / "moves.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [_entry(i, line, store) for i, line in enumerate(content.split(b"\n")[:-1], 1)]


def newest_entries(store: Store, count: int) -> list[Entry]:
    """The last entries of the record, newest first, without reading the others. Raises ArtifactError."""
    try:
        with (store.root / "moves.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            length = 2**16
            while True:
                file.seek(max(0, size - length))
                lines = file.read().split(b"\n")[:-1]
                if len(lines) > count or length >= size:
                    break
                length *= 2
    except FileNotFoundError:
        return []
    return [_entry(None, line, store) for line in reversed(lines[-count:])]


def problems_of_record(store: Store) -> list[str]:
    """Where the record of moves was changed, and which names do not point to what it says. Raises ArtifactError."""
    problems, before = [], ""
    recorded = entries(store)
    latest: dict[Ref, str | None] = {}
    for entry in recorded:
        if entry.check != _check(before, _value(entry)):
            problems.append(f"line {entry.number} of moves.jsonl, or one before it, was changed")
            break
        before = entry.check
        latest.update({each.ref: each.new for each in entry.moves})
    if problems:
        return problems
    for ref in dict.fromkeys([HEAD, *every(store), *latest]):
        now, last = target(store, ref), latest.get(ref)
        if now != last:
            problems.append(f"the name {ref} points to {now}, but was moved to {last}")
    return problems


def complete(store: Store, last: Entry | None = None) -> None:
    """Complete the last recorded move, and write `index.json`. Only inside of `layout.changing`."""
    if last is None:
        last = _last(store)
    for each in last.moves if last else ():
        if target(store, each.ref) != each.old:
            continue  # done already; or damaged, which steer verify names
        path = path_of(store, each.ref)
        if each.new is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, f"{each.new}\n".encode())
    write_index(store)


def write_index(store: Store) -> None:
    """Write `index.json`, which names to other tools what the names point to."""
    manifests = []
    for ref, digest in every(store).items():
        size = blobs.path_of(store, digest).stat().st_size if blobs.has(store, digest) else 0
        described = blobs.Descriptor(
            "application/vnd.oci.image.manifest.v1+json", digest, size, {"org.opencontainers.image.ref.name": str(ref)}
        )
        manifests.append(described.value())
    content = canonical_json(layout.index(manifests)).encode()
    path = store.root / "index.json"
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def undo(store: Store, command: str) -> Entry:
    """Undo the last recorded move that is not undone yet: every name points again to what it did before it.

    Raises UsageError where there is none.
    """
    with layout.changing(store):
        complete(store)
        recorded = entries(store)
        undone = {entry.undoes for entry in recorded}
        left = [entry for entry in recorded if entry.undoes is None and entry.number not in undone]
        left = [entry for entry in left if not any(each.ref == HEAD and each.old is None for each in entry.moves)]
        if not left:
            raise UsageError("there is no move to undo", "all of them: steer log --moves")
        back = {each.ref: each.old for each in left[-1].moves}
        return point_while_changing(store, back, command, undoes=left[-1].number)


def author() -> str:
    """Who commits: `STEER_AUTHOR`, or the name of the user."""
    name = os.environ.get("STEER_AUTHOR", "").strip()
    if name:
        return name[:200]
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without an entry, as in a container
        return "unknown"


def _valid(text: str, pattern: re.Pattern[str], what: str, rule: str) -> str:
    if not pattern.fullmatch(text) or len(text) > LONGEST:
        raise UsageError(f"{text[:LONGEST]!r} can't be a {what}", f"a {what} is made of {rule}, at most {LONGEST}")
    return text


def _read(path: Path) -> str | None:
    try:
        return json_text.read_bounded(path, 1000).decode("ascii").removesuffix("\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read: {error}", "check the store: steer verify") from error


def _last(store: Store) -> Entry | None:
    return next(iter(newest_entries(store, 1)), None)


def _value(entry: Entry) -> dict[str, Any]:
    return {
        "number": entry.number, "time": round(entry.time, 3), "author": entry.author, "command": entry.command,
        "undoes": entry.undoes,
        "moves": [{"ref": list(each.ref), "old": each.old, "new": each.new} for each in entry.moves],
    }  # fmt: skip


def _check(before: str, value: Mapping[str, Any]) -> str:
    return digest_json([before, dict(value)])


def _entry(number: int | None, line: bytes, store: Store) -> Entry:
    try:
        value = json_text.parse(line)
        moves = tuple(Move(_ref(each["ref"]), _point(each["old"]), _point(each["new"])) for each in value["moves"])
        if number is not None and value["number"] != number:
            raise ValueError(f"it is numbered {value['number']}")
        return Entry(
            int(value["number"]), float(value["time"]), str(value["author"]), str(value["command"]), moves,
            value["undoes"], str(value["check"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"line {number or '(the last)'} of {store.root / 'moves.jsonl'} is damaged: {error}",
            "check the store: steer verify",
        ) from error


def _ref(parts: Sequence[str]) -> Ref:
    kind, name, label = parts
    made = {
        "HEAD": lambda: HEAD,
        "branch": lambda: branch(name),
        "tag": lambda: tag(name, label),
        "alias": lambda: alias(name, label),
    }
    return made[kind]()


def _point(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and (blobs.DIGEST.fullmatch(value) or NAME.fullmatch(value))):
        return value
    raise ValueError(f"{value!r} is neither a digest nor a branch")


def pointed_at(recorded: Sequence[Entry]) -> Iterator[str]:
    """Every digest that a name has ever pointed to, by the record of moves."""
    for entry in recorded:
        for each in entry.moves:
            if each.ref.kind != "HEAD":
                yield from (digest for digest in (each.old, each.new) if digest)
