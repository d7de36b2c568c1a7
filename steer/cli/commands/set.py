"""`steer set`: change values of personality.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer set`."""

    settings: tuple[str, ...] = option(
        (), help="PART.FIELD=VALUE, or serve.NAME=VALUE, merge.NAME=VALUE, base=MODEL.", argument=True,
        metavar="SETTING...",
    )  # fmt: skip


@options.command(
    summary="Change values of personality.yaml.",
    examples="""
    steer set warm.strength=0.8
    steer set warm.layers=12-15 warm.scope=response serve.temperature=0.7
    steer set warm.scope=
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Change values of personality.yaml; an empty value removes the field, so that its default counts again."""
    request = requests.build(Request, values)
    from steer.store import layout
    from steer.store.working import settings

    store = layout.require()
    if not request.settings:
        raise UsageError("no setting is given", "steer set warm.strength=0.8")
    changed = settings.apply(store, request.settings)
    out.result({"changed": changed}, lambda: out.line("\n".join(f"{key} = {value}" for key, value in changed.items())))
