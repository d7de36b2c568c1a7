"""`steer gc`: remove what no version needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer gc`."""

    yes: bool = option(False, help="Remove it; without this it is only shown.")
    days: float = option(30.0, help="For how many days what a name has pointed to is kept.", low=0)


@options.command(
    summary="Remove what no version needs.",
    examples="""
    steer gc
    steer gc --yes
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show, or remove, the blobs that no name, no recent move of a name and no working file leads to.

    Blobs of the last hour are left alone, since a command may be about to point to them.
    """
    request = requests.build(Request, values)
    from steer.store import gc, layout

    store = layout.require()
    found = (gc.collect if request.yes else gc.unreachable)(store, days=request.days)
    size = sum(found.sizes.values())
    data = {"blobs": found.sizes, "bytes": size, "fresh": found.fresh, "removed": request.yes}

    def human() -> None:
        verb = "removed" if request.yes else "would remove"
        out.line(f"{verb} {len(found.sizes)} blobs, {size / 1e6:.2f} MB; {found.fresh} fresh ones are left alone")
        if found.sizes and not request.yes:
            out.line("\nremove them: steer gc --yes")

    out.result(data, human)
