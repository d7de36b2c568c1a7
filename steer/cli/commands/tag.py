"""`steer tag`: give a version a name that does not move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer tag`."""

    tag: str = option(help="The tag: v1, or name:v1 of another branch.", argument=True)
    version: str = option("HEAD", help="name, name:tag, name@alias or a digest.", argument=True, metavar="[VERSION]")
    force: bool = option(False, help="Move a tag that exists.")
    delete: bool = option(False, help="Remove the tag.")


@options.command(
    summary="Give a version a name that does not move.",
    examples="""
    steer tag v1
    steer tag v0.9 tone~2
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Give a version a tag, such as v1; steer log shows it, and NAME:v1 names the version from then on."""
    request = requests.build(Request, values)
    from steer.store import layout, names, refs

    store = layout.require()
    name, _, label = request.tag.rpartition(":")
    ref = refs.tag(name or refs.current(store), label)
    digest = None if request.delete else names.resolve(store, request.version)
    if request.delete and refs.target(store, ref) is None:
        raise UsageError(f"there is no tag {ref}", "steer log shows the tags")
    refs.point(store, {ref: digest}, versions.typed(), force=request.force or request.delete)
    sentence = f"removed {ref}" if digest is None else f"{ref} is {names.short(digest)}"
    out.result({"tag": str(ref), "version": digest}, lambda: out.line(sentence))
