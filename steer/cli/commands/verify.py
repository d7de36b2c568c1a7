"""`steer verify`: whether the store is whole, and a version or a folder is what was signed or what a build gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import ArtifactError, UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer verify`."""

    what: str | None = option(
        None, help="A version, or a folder, whose signature is checked.", argument=True,
        metavar="[VERSION_OR_FOLDER]", default_text="the whole store",
    )  # fmt: skip
    key: Path | None = option(None, help="The public key that the signature must be of.")
    bundle: Path | None = option(None, help="The signature of a folder.", default_text="model.sig in the folder")
    rebuild: Path | None = option(
        None, help="Build the version again and compare every byte with this folder of steer build.", metavar="FOLDER"
    )


@options.command(
    summary="Check that the store is whole, or the signature of a version or a folder.",
    examples="""
    steer verify
    steer verify tone@champion --key signer.pem.pub
    steer verify ./warm-model --key signer.pem.pub
    steer verify tone:v1 --rebuild tone-v1/
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Hash every blob of the store again, and follow every name through all its versions to their parts.

    With --key, check the signature of a version or a folder; with --rebuild, that a folder is what its version builds.
    """
    request = requests.build(Request, values)
    if request.rebuild is not None:
        _rebuild(request, request.rebuild)
    elif request.what is not None:
        _signature(request, request.what)
    elif request.key is not None or request.bundle is not None:
        raise UsageError("it is not said what was signed", "steer verify VERSION --key KEY")
    else:
        _store()


def _store() -> None:
    from steer.store import layout, verify

    store = layout.require()
    with out.progress() as on_event:
        found = verify.verify(store, on_event)
    if found.problems:
        raise ArtifactError(list(found.problems), "pull what is damaged from a remote, or restore it from a backup")
    sentence = f"{store.root} is whole: {found.commits} versions, {found.blobs} blobs, {found.bytes / 1e6:.2f} MB"
    data = {"store": str(store.root), "blobs": found.blobs, "bytes": found.bytes, "commits": found.commits}
    out.result(data, lambda: out.line(sentence))


def _signature(request: Request, what: str) -> None:
    from steer.store import layout, signing

    if request.key is None:
        raise UsageError("no public key is given", f"steer verify {what} --key KEY.pub")
    folder = Path(what)
    if folder.is_dir():
        bundle = request.bundle or folder / signing.BUNDLE
        signing.verify_folder(folder, request.key, bundle)
        out.result({"verified": what, "bundle": str(bundle)}, lambda: out.line(f"{what} is what was signed"))
        return
    count = signing.verify_version(layout.require(), what, request.key)
    out.result({"verified": what, "signatures": count}, lambda: out.line(f"{what} is what was signed"))


def _rebuild(request: Request, folder: Path) -> None:
    from steer.store import layout, names
    from steer.store.using import realise

    store = layout.require()
    version = request.what or "HEAD"
    with out.progress() as on_event:
        problems = realise.problems_of_build(store, names.resolve(store, version), folder, on_event=on_event)
    if problems:
        raise ArtifactError(problems, f"build it again: steer build {version} -o FOLDER")
    out.result({"verified": str(folder), "version": version}, lambda: out.line(f"{folder} is what {version} builds"))
