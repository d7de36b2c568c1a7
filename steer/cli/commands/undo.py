"""`steer undo`: let every name point again to what it did before the last move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out


@dataclass(frozen=True, kw_only=True)
class Request:
    """`steer undo` takes no arguments."""


@options.command(
    summary="Undo the last move of branches, tags and aliases.",
    examples="""
    steer undo
    steer log --moves
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Undo the last move of names (a commit, tag, promotion, merge, checkout), and once more the one before it.

    Only names move: personality.yaml stays as it is, and steer status shows how it differs.
    """
    requests.build(Request, values)
    from steer.store import layout, refs

    store = layout.require()
    entry = refs.undo(store, versions.typed())
    undone = next(each for each in refs.entries(store) if each.number == entry.undoes)

    def human() -> None:
        out.line(f"undone: {undone.command}")
        for each in entry.moves:
            out.line(f"{each.ref} is {'nothing' if each.new is None else each.new[:15]} again")

    moves = [{"name": str(each.ref), "old": each.old, "new": each.new} for each in entry.moves]
    out.result({"undone": undone.command, "moves": moves}, human)
