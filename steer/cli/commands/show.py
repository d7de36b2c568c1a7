"""`steer show`: one version in full."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer show`."""

    version: str = option("HEAD", help="name, name:tag, name@alias or a digest.", argument=True, metavar="[VERSION]")
    card: bool = option(False, help="Print the model card, in Markdown.")


@options.command(
    summary="Show one version in full.",
    examples="""
    steer show
    steer show tone@champion --card
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show a version: who made it and why, its parts with their digests, its expression, and its manifest in --json."""
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.objects.card import card
    from steer.store.objects.model import STEERING, read_commit, read_composition, read_manifest

    store = layout.require()
    digest = names.resolve(store, request.version)
    commit = read_commit(store, digest)
    personality = read_composition(store, commit.composition)
    labels = versions.names_of(store)
    expression = str(personality.expression()) if personality.of_kind(STEERING) else None
    data = versions.commit_value(commit, labels) | {
        "personality": personality.value(), "expression": expression, "manifest": read_manifest(store, digest),
        "card": card(personality),
    }  # fmt: skip

    def human() -> None:
        if request.card:
            out.line(card(personality).rstrip("\n"))
            return
        moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(commit.time))
        facts = {
            "version": digest, "names": ", ".join(data["names"]), "composition": commit.composition,
            "parents": ", ".join(map(names.short, commit.parents)), "made": f"{moment} by {commit.author}",
            "command": commit.command, "base": personality.base, "expression": expression or "",
        }  # fmt: skip
        out.line("\n".join(f"{key:12} {value}" for key, value in facts.items() if value))
        out.line("\n" + "\n".join(f"    {line}" for line in commit.message.splitlines()) + "\n")
        rows = [[part.name, part.kind, f"{part.strength:g}", part.digest] for part in personality.parts]
        out.table(["part", "kind", "strength", "digest"], rows, left=2)

    out.result(data, human)
