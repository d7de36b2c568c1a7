"""`steer pull`: fetch versions from a remote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer pull`."""

    remote: str = option(
        help="A folder, a URL of fsspec (s3://…), oci://host/path, or hf://user/repository.", argument=True
    )
    name: str | None = option(
        None, help="The personality.", argument=True, metavar="[NAME]", default_text="the current branch"
    )
    as_: str | None = option(None, help="The name that the branch gets here.", default_text="NAME", flag="--as")
    force: bool = option(False, help="Move tags, and lose versions that are only here.")


@options.command(
    summary="Fetch versions from a remote.",
    examples="""
    steer pull /mnt/shared/personalities
    steer pull oci://registry.example/team tone
    steer pull hf://user/tone tone --as theirs
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Fetch a branch with its tags, aliases and all its versions; every digest is checked before a name moves.

    The working folder follows where the pulled branch is the current one and nothing in it is uncommitted.
    """
    request = requests.build(Request, values)
    from steer.store import layout, refs
    from steer.store.remotes import open_remote, transfer
    from steer.store.working import checkout

    store = layout.require()
    here = refs.current(store)
    name = request.name or here
    follows = (request.as_ or name) == here
    if follows and not request.force:
        checkout.require_clean(store)
    with out.progress() as on_event:
        fetched = transfer.pull(
            store, open_remote(request.remote, name), name, versions.typed(), as_=request.as_, force=request.force,
            on_event=on_event,
        )  # fmt: skip
    if follows:
        checkout.restore(store, fetched.names[here])
    sentence = f"pulled {', '.join(fetched.names)}: {fetched.objects} objects, {fetched.bytes / 1e6:.2f} MB"
    data = {"remote": request.remote, "names": fetched.names, "objects": fetched.objects, "bytes": fetched.bytes}
    out.result(data, lambda: out.line(sentence))
