"""`steer status`: what of personality.yaml is not committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out


@dataclass(frozen=True, kw_only=True)
class Request:
    """`steer status` takes no arguments."""


@options.command(
    summary="Show what of personality.yaml is not committed.",
    examples="""
    steer status
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show the current branch, and what differs between personality.yaml and its newest commit."""
    requests.build(Request, values)
    from steer.store import layout
    from steer.store.names import short
    from steer.store.working import folder

    store = layout.require()
    status = folder.status(store)
    data = {
        "branch": status.branch,
        "commit": None if status.commit is None else versions.commit_value(status.commit),
        "changes": versions.difference_value(store, status.difference),
        "not_stored": list(status.not_stored),
    }

    def human() -> None:
        at = "no commit yet" if status.commit is None else f"at {short(status.commit.digest)}  {status.commit.title}"
        out.line(f"on the branch {status.branch}, {at}")
        if not status.difference:
            out.line("nothing to commit")
            return
        out.line("not committed:")
        versions.print_difference(store, status.difference)
        out.line("\nnext: steer commit -m MESSAGE")

    out.result(data, human)
