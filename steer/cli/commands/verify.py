"""`steer verify`: whether the store is whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class Request:
    """`steer verify` takes no arguments."""


@options.command(
    summary="Check that the store is whole: every blob, every name, every version.",
    examples="""
    steer verify
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Hash every blob again, and follow every name through all its versions to their parts."""
    requests.build(Request, values)
    from steer.store import layout, verify

    store = layout.require()
    with out.progress() as on_event:
        found = verify.verify(store, on_event)
    if found.problems:
        raise ArtifactError(list(found.problems), "pull what is damaged from a remote, or restore it from a backup")
    sentence = f"{store.root} is whole: {found.commits} versions, {found.blobs} blobs, {found.bytes / 1e6:.2f} MB"
    out.result({"store": str(store.root), "blobs": found.blobs, "bytes": found.bytes, "commits": found.commits},
               lambda: out.line(sentence))  # fmt: skip
