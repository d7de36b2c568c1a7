"""Signatures of OpenSSF Model Signing 1.0: of a folder, or of the files of a version, with an elliptic-curve key.

A bundle is what the command `model_signing` writes and reads (predicate type https://model_signing/signature/v1.0).
Everything is offline: the key is a file, and no transparency log is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.store import blobs, names, referrers
from steer.store.layout import Store
from steer.store.objects.model import COMPOSITION, TITLE, read_commit, read_manifest
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.files import new_file
from vectors.storage.locks import temporary_folder

BUNDLE = "model.sig"
EXTRA = "pip install 'steer-workbench[sign]'"


def new_key(file: Path) -> Path:
    """Write a new private key (P-256, PEM, readable by its owner) and FILE.pub; returns the latter. OutputError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = file.with_name(f"{file.name}.pub")
    for target in (file, public):
        if target.exists():
            raise OutputError(f"{target} exists", "choose another file")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with new_file(file, mode=0o600) as out:
        out.write(private)
    with new_file(public) as out:
        out.write(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    return public


def sign_folder(folder: Path, key: Path, bundle: Path) -> None:
    """Sign every file of a folder; the bundle itself, if it lies there, is left out. UsageError, OutputError."""
    signing = _library().signing
    _require_file(key, "the private key")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "name a model's folder, or a version of the store")
    # Not in the folder, since all that lies there is signed.
    with temporary_folder(folder.absolute().with_name(f"{folder.absolute().name}.sig")) as work:
        made = work / bundle.name
        with _reporting(f"{folder} can't be signed"):
            signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_hashing(bundle)).sign(
                folder, made
            )
        with new_file(bundle) as out:
            out.write(made.read_bytes())


def verify_folder(folder: Path, key: Path, bundle: Path) -> None:
    """Check a folder against a bundle. Raises ArtifactError for a file that was changed, added or removed."""
    verifying = _library().verifying
    _require_file(key, "the public key")
    _require_file(bundle, "the bundle")
    with _reporting(f"{folder} does not match {bundle}"):
        verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing(bundle)).verify(
            folder, bundle
        )


def sign_version(store: Store, version: str, key: Path) -> str:
    """Sign the files of a version's composition, and attach the bundle to it; returns the digest of the signature."""
    composition = read_commit(store, names.resolve(store, version)).composition
    with _files_of(store, composition) as folder, temporary_folder(store.root / "signature") as work:
        sign_folder(folder, key, work / BUNDLE)
        content = (work / BUNDLE).read_bytes()
    return referrers.attach(store, composition, referrers.SIGNATURE, {BUNDLE: content})


def verify_version(store: Store, version: str, key: Path) -> int:
    """Check a version against the signatures attached to it; returns how many are of this key. Raises ArtifactError."""
    composition = read_commit(store, names.resolve(store, version)).composition
    found = referrers.of(store, composition, referrers.SIGNATURE)
    if not found:
        raise ArtifactError(f"{version} has no signature", f"sign it: steer sign {version} --key KEY")
    reasons: list[str] = []
    with _files_of(store, composition) as folder, temporary_folder(store.root / "signature") as work:
        for each in found:
            bundle = work / BUNDLE
            with new_file(bundle) as out:
                out.write(blobs.read(store, each.files[BUNDLE]))
            try:
                verify_folder(folder, key, bundle)
            except ArtifactError as error:
                reasons += error.problems
    if len(reasons) == len(found):
        raise ArtifactError([f"{version}: {reason}" for reason in reasons], "check the key, and who signed it")
    return len(found) - len(reasons)


@contextmanager
def _files_of(store: Store, composition: str) -> Iterator[Path]:
    """A folder with the files of a composition, for a moment."""
    with temporary_folder(store.root / "signed") as folder:
        for layer in read_manifest(store, composition, COMPOSITION)["layers"]:
            title = layer.get("annotations", {}).get(TITLE, "")
            if not title or "/" in title or title.startswith("."):
                raise ArtifactError(f"{composition} names a file {title[:100]!r}", "check the store: steer verify")
            blobs.take(store, layer["digest"], folder / title)
        yield folder


def _hashing(bundle: Path) -> Any:
    """The default hashing of the library, without the bundle, and without what git and the store write."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[bundle], ignore_git_paths=True)


def _library() -> Any:
    try:
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise UsageError("signatures need the package model-signing", EXTRA) from error
    return model_signing


def _require_file(file: Path, what: str) -> None:
    if not file.is_file():
        raise UsageError(f"there is no {file}, {what}", "make a key: steer sign --new-key FILE")


@contextmanager
def _reporting(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises ValueError and errors of cryptography and sigstore
        raise ArtifactError(
            f"{problem}: {' '.join(str(error).split())[:500]}", "check the key and the files"
        ) from error
