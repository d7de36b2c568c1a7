"""`steer log`: the history of versions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer log`."""

    versions: tuple[str, ...] = option(
        (), help="The versions to begin with: name, name:tag, name@alias or a digest.", argument=True,
        metavar="[VERSION]...", default_text="all branches",
    )  # fmt: skip
    count: int = option(30, help="The most versions to show; 0 shows all.", flag=("-n", "--count"), low=0)
    moves: bool = option(False, help="Show the record of moved names instead, which steer undo takes back.")


@options.command(
    summary="Show the history of versions.",
    examples="""
    steer log
    steer log tone@champion -n 5
    steer log --moves
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show the history as a graph, newest first: digest, names, age, author, message, and what changed."""
    request = requests.build(Request, values)
    from steer.store import layout, names, refs
    from steer.store.history.walk import walk

    store = layout.require()
    if request.moves:
        _print_moves(store, request.count)
        return
    tips = [names.resolve(store, text) for text in request.versions]
    tips = tips or list(dict.fromkeys(refs.every(store).values()))
    every = walk(store, tips)
    commits = list(itertools.islice(every, request.count or None))
    more = next(every, None) is not None
    labels = versions.names_of(store)

    def human() -> None:
        if not commits:
            out.line("no version yet; make one: steer commit -m MESSAGE")
            return
        for line in versions.log_lines(store, commits, labels):
            out.line(line)
        if more:
            out.say(f"there are more; show them all: steer log -n 0 (the newest {len(commits)} are shown)")

    out.result({"commits": [versions.commit_value(each, labels) for each in commits], "more": more}, human)


def _print_moves(store: Any, count: int) -> None:
    from steer.store import refs
    from steer.store.names import short

    entries = refs.newest_entries(store, count) if count else list(reversed(refs.entries(store)))

    def shown(value: str | None) -> str:
        return "nothing" if value is None else short(value) if value.startswith("sha256:") else value

    def human() -> None:
        for entry in entries:
            moved = ", ".join(f"{each.ref} {shown(each.old)} → {shown(each.new)}" for each in entry.moves)
            out.line(f"{entry.number:>4}  {versions.age(entry.time)}  {entry.author}  {moved}")
            out.line(f"      {entry.command}")

    data = [
        {
            "number": e.number, "time": e.time, "author": e.author, "command": e.command, "undoes": e.undoes,
            "moves": [{"name": str(each.ref), "old": each.old, "new": each.new} for each in e.moves],
        }
        for e in entries
    ]  # fmt: skip
    out.result({"moves": data}, human)
