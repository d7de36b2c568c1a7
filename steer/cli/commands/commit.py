"""`steer commit`: make a version of personality.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer commit`."""

    message: str = option(help="What changed, and why.", flag=("-m", "--message"), metavar="TEXT")
    allow_empty: bool = option(False, help="Make a commit even if nothing has changed.")


@options.command(
    summary="Make a version of personality.yaml.",
    examples="""
    steer commit -m "Warmer, after the evaluation of Monday"
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Make a version of personality.yaml and all its parts. The author is STEER_AUTHOR, or the user."""
    request = requests.build(Request, values)
    from steer.store import layout
    from steer.store.names import short
    from steer.store.working import folder

    store = layout.require()
    made = folder.commit(store, request.message, versions.typed(), allow_empty=request.allow_empty)
    lines = list(versions.log_lines(store, [made], versions.names_of(store)))
    change = lines[2].strip(" |") if len(lines) > 3 else ""
    sentence = f"{short(made.digest)}  {made.title}" + (f"\n          {change}" if change else "")
    out.result(versions.commit_value(made), lambda: out.line(sentence))
