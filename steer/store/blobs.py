"""Blobs by their digest: written once, never changed, linked where possible and never copied twice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from steer.store.layout import Store
from vectors.documents import json_text
from vectors.errors import ArtifactError, OutputError
from vectors.storage.files import (
    canonical_json,
    copy_content,
    digest_bytes,
    digest_file,
    digest_pieces,
    linked_copy,
    new_file,
)

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
COPIED = 16 * 1024**2  # bytes below which a file outside of the store is a copy, which may be written to
LARGEST_DOCUMENT = 4 * 1024**2  # bytes: what registries accept as a manifest


class Descriptor(NamedTuple):
    """What an OCI manifest says about a blob."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}

    def value(self) -> dict[str, Any]:
        """The descriptor as JSON."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return value | ({"annotations": self.annotations} if self.annotations else {})


def path_of(store: Store, digest: str) -> Path:
    """Where the blob of a digest lies. Raises ArtifactError for what is no digest, before it touches a path."""
    if not DIGEST.fullmatch(digest):
        raise ArtifactError(f"{digest[:100]!r} is not a digest", "a digest is sha256: and 64 hexadecimal digits")
    return store.blobs / digest.removeprefix("sha256:")


def has(store: Store, digest: str) -> bool:
    """Whether the blob is there."""
    return path_of(store, digest).is_file()


def put_bytes(store: Store, content: bytes) -> str:
    """Store bytes; returns their digest. Raises OutputError."""
    digest = digest_bytes(content)
    if _refresh(store, digest):
        return digest
    with new_file(path_of(store, digest), mode=0o444, folder=store.blobs.parent) as file:
        file.write(content)
    return digest


def put_json(store: Store, value: Any) -> tuple[str, int]:
    """Store the canonical JSON of a value; returns its digest and its size in bytes. Raises OutputError."""
    content = canonical_json(value).encode()
    return put_bytes(store, content), len(content)


def put_file(store: Store, file: Path, digest: str | None = None) -> str:
    """Store a file, sharing its blocks where the file system can; returns its digest.

    With a `digest` given, the file must have it. The bytes that were stored are hashed, so a file that changes
    meanwhile is refused. Raises OutputError, ArtifactError.
    """
    try:
        actual = digest_file(file)
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error.strerror or error}", "check the path") from error
    if digest is not None and actual != digest:
        raise ArtifactError(f"{file} has the digest {actual}, not {digest}", "its content has changed")
    if _refresh(store, actual):
        return actual
    target = path_of(store, actual)
    with new_file(target, mode=0o444, folder=store.blobs.parent) as new, file.open("rb") as old:
        copy_content(old, new)
        new.seek(0)
        if digest_pieces(iter(lambda: new.read(1024**2), b"")) != actual:
            raise ArtifactError(f"{file} changed while it was read", "run this again when nothing writes to it")
    return actual


def adopt(store: Store, file: Path, digest: str) -> None:
    """Make a file, which has this digest, a blob without a copy where the file system can. Raises OutputError."""
    linked_copy(file, path_of(store, digest), copied_below=COPIED)


def take(store: Store, digest: str, target: Path) -> None:
    """Make `target` a file with the blob's content: blocks or the file shared where possible, else a copy.

    A hard link of a blob is read-only, since a change through it would change the blob. Raises OutputError.
    """
    source = path_of(store, digest)
    if not source.is_file():
        raise missing(digest)
    linked_copy(source, target, copied_below=COPIED)


def read(store: Store, digest: str, largest: int = LARGEST_DOCUMENT) -> bytes:
    """The bytes of a small blob, whose digest is checked. Raises ArtifactError."""
    try:
        content = json_text.read_bounded(path_of(store, digest), largest)
    except FileNotFoundError:
        raise missing(digest) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the blob {digest} can't be read: {error}", "check the store: steer verify") from error
    if digest_bytes(content) != digest:
        raise ArtifactError(f"the blob {digest} is damaged: its content has another digest", "steer verify lists all")
    return content


def read_json(store: Store, digest: str) -> dict[str, Any]:
    """The object in a blob. Raises ArtifactError."""
    try:
        value = json_text.parse(read(store, digest), unique=True)
    except ValueError as error:
        raise ArtifactError(f"the blob {digest} is no document: {error}", "check the store: steer verify") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"the blob {digest} holds no object", "check the store: steer verify")
    return value


def every(store: Store) -> Iterator[str]:
    """The digests of all blobs, by the names of their files."""
    with os.scandir(store.blobs) as entries:
        for entry in entries:
            digest = f"sha256:{entry.name}"
            if DIGEST.fullmatch(digest):
                yield digest


def missing(digest: str) -> ArtifactError:
    """The error for a blob that is not there."""
    return ArtifactError(f"the blob {digest} is missing", "pull it, or check the store: steer verify")


def _refresh(store: Store, digest: str) -> bool:
    """Whether the blob is there; its time becomes now, so that `steer gc` takes it as fresh."""
    try:
        os.utime(path_of(store, digest))
    except FileNotFoundError:
        return False
    except OSError as error:
        if not has(store, digest):
            raise OutputError(f"{store.blobs} can't be read: {error.strerror}", "check its permissions") from error
    return True
