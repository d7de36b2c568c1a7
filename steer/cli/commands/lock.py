"""`steer lock`: pin every part of personality.yaml to its digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out


@dataclass(frozen=True, kw_only=True)
class Request:
    """`steer lock` takes no arguments."""


@options.command(
    summary="Pin every part of personality.yaml to its digest.",
    examples="""
    steer lock
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Pin every part of personality.yaml to the digest that it has now, and store its content."""
    requests.build(Request, values)
    from steer.store import layout
    from steer.store.working import folder

    pinned = folder.lock(layout.require())
    out.result({"pinned": dict(pinned)}, lambda: out.table(["part", "digest"], [list(each) for each in pinned], left=2))
