"""`steer revert`: take back what one version changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer revert`."""

    version: str = option("HEAD", help="The version to take back.", argument=True, metavar="[VERSION]")
    message: str = option("", help="The message of the new version.", flag=("-m", "--message"), metavar="TEXT",
                          default_text='Revert "…"')  # fmt: skip


@options.command(
    summary="Take back what one version changed, as a new version.",
    examples="""
    steer revert
    steer revert tone~3
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Make a version that takes back what one version changed, and keeps everything that came after it."""
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.combine import revert

    store = layout.require()
    made = revert(store, names.resolve(store, request.version), request.message, versions.typed())
    out.result(versions.commit_value(made), lambda: out.line(f"{names.short(made.digest)}  {made.title}"))
