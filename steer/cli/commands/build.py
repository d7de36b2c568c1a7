"""`steer build`: a version as files: vectors and an expression, or merged weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer build`."""

    version: str | None = option(
        None, help="name, name:tag, name@alias or a digest.", argument=True, metavar="[VERSION]",
        default_text="personality.yaml as it is",
    )  # fmt: skip
    out: Path = option(help="The folder to write.", flag=("-o", "--out"))


@options.command(
    summary="Write a version as files: vectors and an expression, or merged weights.",
    examples="""
    steer build -o built/
    steer build tone:v1 -o tone-v1/
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write steering vectors with their expression, and task vectors merged into the base as a model's folder.

    The same version gives the same bytes, anywhere.
    """
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.objects.model import read_commit, read_composition
    from steer.store.using.realise import build
    from steer.store.working import parts

    store = layout.require()
    if request.version is None:
        personality, found = parts.read(store)
        parts.require_stored(store, found)
    else:
        digest = names.resolve(store, request.version)
        personality = read_composition(store, read_commit(store, digest).composition)
    with out.progress() as on_event:
        made = build(store, personality, request.out, on_event=on_event)

    def human() -> None:
        if made["expression"]:
            out.line(f"expression  {made['expression']}")
        out.line(f"wrote {', '.join(made['folders'])}")

    out.result(made, human)
