"""`steer checkout`: make the working folder that of a version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer checkout`."""

    version: str = option("HEAD", help="name, name:tag, name@alias or a digest.", argument=True, metavar="[VERSION]")
    branch: str | None = option(None, help="Make this branch there, and switch to it.", flag=("-b", "--branch"))
    force: bool = option(False, help="Replace changes that are in no commit.")


@options.command(
    summary="Make the working folder that of a version.",
    examples="""
    steer checkout tone
    steer checkout tone:v1 -b calmer
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write personality.yaml and the vectors of a version. Commits go to the branch that is checked out."""
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.working.checkout import checkout

    store = layout.require()
    digest = names.resolve(store, request.version)
    branch = request.branch
    if branch is None:
        ref = names.ref_of(store, request.version)
        if ref is None or ref.kind != "branch":
            raise UsageError(
                f"{request.version} is no branch, so commits could not go to it",
                f"make a branch there: steer checkout {request.version} -b NAME",
            )
        branch = ref.name
    written = checkout(store, digest, branch, versions.typed(), create=request.branch is not None, force=request.force)
    files = f"; wrote {', '.join(written)}" if written else ""
    sentence = f"on the branch {branch}, at {names.short(digest)}{files}"
    out.result({"branch": branch, "version": digest, "written": written}, lambda: out.line(sentence))
