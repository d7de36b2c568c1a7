"""`steer export`: a baked model in a form that other tools carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer export`."""

    model: Path = option(help="A model's folder, such as steer bake, merge and build write.", argument=True)
    out: Path = option(help="The folder to write.", flag=("-o", "--out"))
    modelpack: bool = option(False, help="Write a CNCF ModelPack, as an OCI image layout.")
    name: str = option("", help="The model's name in it.", default_text="the folder's")
    tag: str = option("latest", help="The tag in the layout.")


@options.command(
    summary="Write a baked model as a CNCF ModelPack.",
    examples="""
    steer export warm-model/ --modelpack -o warm-pack/
    oras cp --from-oci-layout warm-pack:latest registry.example/team/warm:v1
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write a model's folder as a CNCF ModelPack: an OCI image layout whose layers are its files, without compression.

    The same folder gives the same bytes. Registries, oras, kit and modctl read it.
    """
    request = requests.build(Request, values)
    if not request.modelpack:
        raise UsageError("the form to export to is not given", "the only one so far: --modelpack")
    from steer.store.refs import LABEL
    from steer.store.using.modelpack import export

    if not LABEL.fullmatch(request.tag):
        raise UsageError(f"{request.tag!r} can't be a tag", "a tag is made of letters, digits, _ . and -")
    if request.out.exists():
        raise UsageError(f"{request.out} exists", "choose another --out, or remove it")
    with out.progress() as on_event:
        packed = export(request.model, request.out, name=request.name, tag=request.tag, on_event=on_event)

    def human() -> None:
        out.table(["file", "media type"], [[name, kind] for name, kind in packed.files.items()], 2)
        out.line(f"wrote {request.out}:{request.tag}  {packed.digest}")

    out.result({"layout": str(request.out), "tag": request.tag, "digest": packed.digest, "files": packed.files}, human)
