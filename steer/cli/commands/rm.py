"""`steer rm`: remove a part from personality.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer rm`."""

    name: str = option(help="The part to remove.", argument=True)


@options.command(
    summary="Remove a part from personality.yaml.",
    examples="""
    steer rm formal
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Remove a part from personality.yaml. Its file stays; versions that hold the part keep it."""
    request = requests.build(Request, values)
    from steer.store import layout
    from steer.store.working import document

    document.edit(layout.require().file, document.without_part(request.name))
    out.result({"removed": request.name}, lambda: out.line(f"removed {request.name}"))
