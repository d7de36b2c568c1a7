"""`steer blame`: the version that last changed a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer blame`."""

    part: str | None = option(None, help="A part.", argument=True, metavar="[PART]", default_text="all parts")
    version: str = option("HEAD", help="The version to begin with.")


@options.command(
    summary="Show the version that last changed a part.",
    examples="""
    steer blame warm
    steer blame --version tone@champion
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show, for a part or all, the version that last changed it: its digest, age, author and message."""
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.history.blame import blame

    store = layout.require()
    found = blame(store, names.resolve(store, request.version), request.part)
    rows = [
        [name, names.short(commit.digest), versions.age(commit.time), commit.author, commit.title]
        for name, commit in found.items()
    ]
    data = {name: versions.commit_value(commit) for name, commit in found.items()}
    out.result(data, lambda: out.table(["part", "version", "age", "author", "message"], rows, left=5))
