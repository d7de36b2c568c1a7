"""`steer sign`: sign a version or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(options.Force):
    """The arguments and options of `steer sign`."""

    what: str | None = option(
        None, help="A version, or a folder such as a baked model.", argument=True, metavar="[VERSION_OR_FOLDER]",
        default_text="HEAD",
    )  # fmt: skip
    key: Path | None = option(None, help="The private key (elliptic curve, PEM).")
    out: Path | None = option(
        None, help="The bundle to write, for a folder.", flag=("-o", "--out"), default_text="model.sig in the folder"
    )
    new_key: Path | None = option(None, help="Make a key: write FILE and FILE.pub, and exit.", metavar="FILE")


@options.command(
    summary="Sign a version or a model's folder (OpenSSF Model Signing).",
    examples="""
    steer sign --new-key signer.pem
    steer sign tone@champion --key signer.pem
    steer sign ./warm-model --key signer.pem
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Sign every file of a version or a folder, offline, with a key of your own.

    The signature of a version is attached to its composition, in this store: push and pull send versions alone. A
    bundle verifies with `steer verify` and with the command `model_signing`.
    """
    request = requests.build(Request, values)
    from steer.store import layout, names, signing

    if request.new_key is not None:
        public = signing.new_key(request.new_key)
        data = {"key": str(request.new_key), "public": str(public)}
        out.result(data, lambda: out.line(f"wrote {request.new_key} (keep it secret) and {public}"))
        return
    if request.key is None:
        raise UsageError("no key is given", "add --key FILE, or make one: steer sign --new-key FILE")
    folder = Path(request.what) if request.what is not None else None
    if folder is not None and folder.is_dir():
        bundle = request.out or folder / signing.BUNDLE
        output.require_absent(bundle, request.force)
        signing.sign_folder(folder, request.key, bundle)
        out.result({"folder": str(folder), "bundle": str(bundle)}, lambda: out.line(f"wrote {bundle}"))
        return
    store = layout.require()
    version = request.what or "HEAD"
    attached = signing.sign_version(store, version, request.key)
    sentence = f"signed {version} ({names.short(names.resolve(store, version))})"
    out.result({"version": version, "signature": attached}, lambda: out.line(sentence))
