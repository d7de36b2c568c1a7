"""`steer promote`: let an alias, such as champion, point to a version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer promote`."""

    version: str = option("HEAD", help="name, name:tag, name@alias or a digest.", argument=True, metavar="[VERSION]")
    to: str = option("champion", help="The alias.", metavar="ALIAS")
    require_eval: bool = option(False, help="Refuse a version without an evaluation that says it works.")
    force: bool = option(False, help="Promote it whatever its evaluations say.")


@options.command(
    summary="Let an alias such as champion point to a version.",
    examples="""
    steer promote tone --require-eval
    steer promote tone~1 --to challenger
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Let an alias point to a version, if it has the evaluations that its evals: list and --require-eval ask for.

    steer undo takes it back.
    """
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.using.promote import promote

    store = layout.require()
    alias, digest, before = promote(
        store, request.version, request.to, versions.typed(), require_eval=request.require_eval, force=request.force
    )
    was = f", before it was {names.short(before)}" if before else ""
    data = {"alias": str(alias), "version": digest, "before": before}
    out.result(data, lambda: out.line(f"{alias} is {names.short(digest)}{was}"))
