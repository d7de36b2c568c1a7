"""Stores elsewhere, one kind per file: any fsspec URL or folder, an OCI registry, a repository of the Hugging Face hub.

A remote is written in one order: blobs, then manifests, then names, so that a push which is interrupted can't be seen.
"""

from __future__ import annotations

from steer.store.remotes._protocol import Remote
from vectors.errors import UsageError


def open_remote(url: str, name: str) -> Remote:
    """The remote of a URL for a personality: `oci://host/path`, `hf://user/repository`, a URL of fsspec, or a folder.

    Raises UsageError.
    """
    scheme, separator, rest = url.partition("://")
    if separator and not rest:
        raise UsageError(f"{url!r} names no place", "such as oci://registry.example/team, hf://user/tone or a folder")
    if scheme == "oci" and separator:
        from steer.store.remotes.registry import Registry

        return Registry(rest, name)
    if scheme == "hf" and separator:
        from steer.store.remotes.hub import Hub

        return Hub(rest)
    from steer.store.remotes.files import Files

    return Files(url)
