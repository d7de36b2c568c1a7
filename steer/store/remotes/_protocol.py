"""What a kind of remote implements, and what is transferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from steer.store.blobs import Descriptor

SUBJECT = "steer.subject"  # the annotation of what is attached: the composition that it refers to


class Object(NamedTuple):
    """A blob or a manifest to transfer. `title` is the name of a layer's file."""

    digest: str
    size: int
    media_type: str
    manifest: bool
    title: str = ""


class Remote(Protocol):
    """What a kind of remote implements. All methods raise OutputError for a remote that can't be reached."""

    def names(self) -> dict[str, str]:
        """The names that the remote has (`tone`, `tone:v1`, `tone@champion`) and the digests of their commits."""

    def attached(self) -> dict[str, Descriptor]:
        """What is attached to compositions, by digest; the annotation `SUBJECT` names the composition.

        Called after `names`.
        """

    def missing(self, objects: Sequence[Object]) -> list[Object]:
        """Those of the objects that the remote does not have."""

    def put(self, item: Object, path: Path) -> None:
        """Send an object."""

    def get(self, item: Object, target: Path) -> None:
        """Write an object to a file; its digest is checked by the caller."""

    def point(
        self, names: Mapping[str, str], tips: Mapping[str, Sequence[Object]], files: Mapping[str, Path],
        attached: Mapping[str, Descriptor],
    ) -> None:  # fmt: skip
        """Let these names (all that the remote shall have) point to commits, and list all that is attached.

        `tips` are the commits behind each name that was sent; `files` are those of the newest version of the branch.
        """
