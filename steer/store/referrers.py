"""What is attached to a composition later: evaluations, reports of experiments, signatures.

Each is an OCI manifest that refers to the composition as its `subject`, so that a result changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from steer.store import blobs
from steer.store.blobs import Descriptor
from steer.store.layout import Store
from steer.store.objects.model import COMPOSITION, MANIFEST, TITLE, manifest, named, read_manifest
from vectors.documents import json_text
from vectors.errors import ArtifactError, SteerError
from vectors.storage.files import append_line

EVALUATION = "application/vnd.steer.evaluation.v1+json"
EXPERIMENT = "application/vnd.steer.experiment.v1+json"
SIGNATURE = "application/vnd.dev.sigstore.bundle.v0.3+json"
EMPTY = ("application/vnd.oci.empty.v1+json", b"{}")  # the config of an artifact that has none (image-spec 1.1)
LARGEST = 64 * 1024**2  # bytes of a file that is read again


class Referrer(NamedTuple):
    """What refers to a composition: its digest, its kind (a media type), and the digests of its files by name."""

    digest: str
    kind: str
    files: Mapping[str, str]


def attach(store: Store, composition: str, kind: str, files: Mapping[str, bytes]) -> str:
    """Attach files to a composition; returns the digest of the manifest. The same files twice are one. OutputError."""
    read_manifest(store, composition, COMPOSITION)
    media_type, content = EMPTY
    config = Descriptor(media_type, blobs.put_bytes(store, content), len(content))
    layers = [
        Descriptor(_media_type(name), blobs.put_bytes(store, data), len(data), named(name))
        for name, data in sorted(files.items())
    ]
    subject = Descriptor(MANIFEST, composition, blobs.path_of(store, composition).stat().st_size)
    digest, _ = blobs.put_json(store, manifest(kind, config, layers, subject))
    remember(store, composition, digest)
    return digest


def of(store: Store, composition: str, kind: str | None = None) -> list[Referrer]:
    """What refers to a composition, in the order in which it was attached."""
    found = []
    for digest in _remembered(store, composition):
        try:
            value = read_manifest(store, digest)
        except SteerError:
            continue  # steer verify names it
        if (value.get("subject") or {}).get("digest") == composition and kind in (None, value.get("artifactType")):
            files = {layer.get("annotations", {}).get(TITLE, ""): layer["digest"] for layer in value["layers"]}
            found.append(Referrer(digest, str(value.get("artifactType")), files))
    return found


def read_report(store: Store, referrer: Referrer) -> dict[str, object]:
    """The `report.json` of an evaluation. Raises ArtifactError."""
    if "report.json" not in referrer.files:
        raise ArtifactError(f"{referrer.digest} holds no report.json", "attach a folder of steer eval")
    try:
        value = json_text.parse(blobs.read(store, referrer.files["report.json"], LARGEST))
    except ValueError as error:
        raise ArtifactError(f"the report in {referrer.digest} is no JSON: {error}", "evaluate again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"the report in {referrer.digest} is no object", "evaluate again")
    return value


def every(store: Store) -> dict[str, list[str]]:
    """By composition: the digests of what refers to it."""
    folder = store.root / "referrers"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {
        f"sha256:{name}": _remembered(store, f"sha256:{name}")
        for name in names
        if blobs.DIGEST.fullmatch(f"sha256:{name}")
    }


def remember(store: Store, composition: str, digest: str) -> None:
    """An index by subject, as the referrers API of a registry has it; without it every blob would be searched."""
    if digest not in _remembered(store, composition):
        path = store.root / "referrers" / composition.removeprefix("sha256:")
        path.parent.mkdir(exist_ok=True)
        append_line(path, digest.encode())


def _remembered(store: Store, composition: str) -> list[str]:
    path = store.root / "referrers" / blobs.path_of(store, composition).name
    if not path.is_file():
        return []
    lines = json_text.read_bounded(path, LARGEST).decode("ascii", "replace").split("\n")[:-1]
    return [line for line in dict.fromkeys(lines) if blobs.DIGEST.fullmatch(line)]


def _media_type(name: str) -> str:
    return {".json": "application/json", ".html": "text/html", ".svg": "image/svg+xml"}.get(
        os.path.splitext(name)[1], "application/octet-stream"
    )
