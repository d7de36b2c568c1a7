"""`steer init`: begin to keep versions of a personality in this folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer init`."""

    name: str | None = option(
        None, help="The name of the personality, which is also its first branch.", argument=True, metavar="[NAME]",
        default_text="that of the folder",
    )  # fmt: skip
    base: str = option("smollm2", help="The base model: " + options.A_MODEL, complete="models")


@options.command(
    summary="Begin to keep versions of a personality in this folder.",
    examples="""
    steer init
    steer init tone --base org/model
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Make the store .steer/ and the file personality.yaml in the current folder (or the store at STEER_HOME)."""
    request = requests.build(Request, values)
    from steer.store import creation, refs
    from steer.store.working import document

    work = Path.cwd()
    name = request.name or re.sub(r"[^a-z0-9]+", "-", work.name.lower()).strip("-") or "main"
    refs.branch(name)
    store = creation.create(work, name)
    new = not store.file.exists()
    if new:
        document.write(store.file, document.NEW.format(base=document.quoted(request.base)))
    data = {"store": str(store.root), "branch": name, "file": str(store.file)}

    def human() -> None:
        out.line(f"made the store {store.root}, on the branch {name}")
        if new:
            out.line(f"made {store.file.name}: the base model is {request.base}")
        out.line("\nnext: steer add warm.safetensors --strength 1.2, then steer commit -m MESSAGE")

    out.result(data, human)
