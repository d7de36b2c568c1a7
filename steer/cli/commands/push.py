"""`steer push`: send versions to a folder, a bucket, a registry or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer push`."""

    remote: str = option(
        help="A folder, a URL of fsspec (s3://…), oci://host/path, or hf://user/repository.", argument=True
    )
    name: str | None = option(
        None, help="The personality.", argument=True, metavar="[NAME]", default_text="the current branch"
    )
    force: bool = option(False, help="Move tags, and lose versions that only the remote has.")


@options.command(
    summary="Send versions to a folder, a bucket, an OCI registry or the Hugging Face hub.",
    examples="""
    steer push /mnt/shared/personalities
    steer push oci://registry.example/team tone
    steer push hf://user/tone
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Send a branch with its tags, aliases and all its versions. An interrupted push changes nothing that is seen."""
    request = requests.build(Request, values)
    from steer.store import layout, refs
    from steer.store.remotes import open_remote, transfer

    store = layout.require()
    name = request.name or refs.current(store)
    with out.progress() as on_event:
        sent = transfer.push(store, open_remote(request.remote, name), name, force=request.force, on_event=on_event)
    sentence = f"pushed {', '.join(sent.names)} to {request.remote}: {sent.objects} objects, {sent.bytes / 1e6:.2f} MB"
    data = {"remote": request.remote, "names": sent.names, "objects": sent.objects, "bytes": sent.bytes}
    out.result(data, lambda: out.line(sentence))
