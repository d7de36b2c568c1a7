"""A model's folder as a CNCF ModelPack (model-spec): an OCI image layout that oras, kit, modctl and registries read.

Each file is a layer as it is, without compression: weights, configuration, documents. No time and no user enters, so
the same folder gives the same bytes; large files are linked where the file system can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steer.store import blobs, layout
from steer.store.blobs import Descriptor
from steer.store.layout import Store
from steer.store.objects.model import DOC, FILEPATH, MANIFEST, TITLE, WEIGHT, WEIGHT_CONFIG, manifest
from vectors.documents import json_text
from vectors.errors import ArtifactError, UsageError
from vectors.events import Event, OnEvent, ignore
from vectors.storage.files import canonical_json, digest_file, write_atomically
from vectors.storage.folders import new_folder
from vectors.weights import read_header

TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
CODE = "application/vnd.cncf.model.code.v1.raw"
REF = "org.opencontainers.image.ref.name"
_KINDS = {".safetensors": WEIGHT, ".gguf": WEIGHT, ".md": DOC, ".html": DOC, ".svg": DOC, ".png": DOC, ".py": CODE}
_PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Packed(NamedTuple):
    """What was written: the digest of the manifest, and the media types of the files by name."""

    digest: str
    files: dict[str, str]


def export(model: Path, out: Path, *, name: str = "", tag: str = "latest", on_event: OnEvent = ignore) -> Packed:
    """Write the layout of a model's folder. Raises UsageError for what is no model's folder, OutputError."""
    files = sorted(_files(model), key=lambda each: each.as_posix())
    weights = [each for each in files if each.suffix == ".safetensors"]
    if not (model / "config.json").is_file() or not weights:
        raise UsageError(f"{model} is no model's folder", "give one that steer bake or steer merge wrote")
    settings = json_text.read_object(model / "config.json", ArtifactError, "the folder of a model has one")
    with new_folder(out) as folder:
        store = Store(folder, folder)
        store.blobs.mkdir(parents=True)
        layers = []
        for i, each in enumerate(files):
            on_event(Event("packing", i, len(files), "files"))
            digest = digest_file(model / each)
            blobs.adopt(store, model / each, digest)
            title = each.as_posix()
            kind = _KINDS.get(each.suffix, WEIGHT_CONFIG)
            size = (model / each).stat().st_size
            layers.append(Descriptor(kind, digest, size, {TITLE: title, FILEPATH: title}))
        config, size = blobs.put_json(store, _config(model, weights, settings, layers, name or model.resolve().name))
        content = manifest(TYPE, Descriptor(CONFIG, config, size), layers)
        digest, size = blobs.put_json(store, content)
        listed = Descriptor(MANIFEST, digest, size, {REF: tag}).value() | {"artifactType": TYPE}
        write_atomically(folder / "index.json", canonical_json(layout.index([listed])).encode())
        write_atomically(folder / "oci-layout", canonical_json({"imageLayoutVersion": "1.0.0"}).encode())
    return Packed(digest, {layer.annotations[TITLE]: layer.media_type for layer in layers})


def _files(model: Path) -> Iterator[Path]:
    """The files of a folder, relative to it, without hidden ones. Raises UsageError for a link that leads out of it."""
    root = os.path.realpath(model)
    for path in model.rglob("*"):
        relative = path.relative_to(model)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_symlink() and not os.path.realpath(path).startswith(root + os.sep):
            raise UsageError(f"{path} is a link that leaves the folder", "pack a folder that holds its files")
        yield relative


def _config(
    model: Path, weights: list[Path], settings: Mapping[str, Any], layers: list[Descriptor], name: str
) -> dict[str, Any]:
    """The model's config of ModelPack. `createdAt` is optional, and left out: it would change the digest."""
    shapes = [entry for each in weights for entry in read_header(model / each)[0].values()]
    count = sum(entry.elements for entry in shapes)
    dtypes = sorted({_PRECISIONS.get(entry.dtype, entry.dtype.lower()) for entry in shapes})
    architecture = settings.get("architectures")
    described = {"name": name, "family": str(settings.get("model_type", ""))}
    return {
        "descriptor": {key: value for key, value in described.items() if value},
        "config": {
            "architecture": "transformer", "format": "safetensors", "paramSize": f"{count / 1e9:.3g}B",
            "precision": dtypes[0] if len(dtypes) == 1 else "mixed",
            **({"annotations": {"steer.architecture": str(architecture[0])}} if architecture else {}),
        },
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }  # fmt: skip
