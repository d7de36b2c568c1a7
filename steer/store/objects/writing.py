"""Writes compositions and commits as OCI manifests with ModelPack layers."""

from __future__ import annotations

from dataclasses import asdict

from steer.store import blobs
from steer.store.blobs import Descriptor
from steer.store.layout import FILE, Store
from steer.store.objects.card import card, yaml_of
from steer.store.objects.model import (
    COMMIT,
    COMPOSITION,
    DOC,
    MANIFEST,
    SCHEMA,
    WEIGHT,
    WEIGHT_CONFIG,
    Commit,
    Personality,
    descriptor_of,
    manifest,
    named,
    read_manifest,
)  # fmt: skip


def put_composition(store: Store, personality: Personality) -> str:
    """Store a composition, whose parts' blobs are there; returns its digest: that of its manifest."""
    config, config_size = blobs.put_json(store, personality.value())
    files = {
        FILE: (WEIGHT_CONFIG, yaml_of(personality).encode()),
        "README.md": (DOC, card(personality).encode()),
    }
    layers = [
        Descriptor(WEIGHT, part.digest, part.size, named(f"{part.name}.safetensors")) for part in personality.parts
    ]
    layers += [
        Descriptor(media_type, blobs.put_bytes(store, content), len(content), named(name))
        for name, (media_type, content) in files.items()
    ]
    return blobs.put_json(store, manifest(COMPOSITION, Descriptor(COMPOSITION, config, config_size), layers))[0]


def put_commit(store: Store, commit: Commit, written: str = "") -> str:
    """Store a commit, whose `digest` is not used; returns its digest: that of its manifest.

    `written` is `personality.yaml` as it was written, with its comments, which are no part of the composition.
    """
    value = {key: entry for key, entry in asdict(commit).items() if key != "digest"} | {"schema": SCHEMA}
    config, size = blobs.put_json(store, value | {"time": round(commit.time, 3)})
    composition = read_manifest(store, commit.composition, COMPOSITION)
    subject = Descriptor(MANIFEST, commit.composition, blobs.path_of(store, commit.composition).stat().st_size)
    layers = [descriptor_of(layer) for layer in composition["layers"]]
    if written:
        content = written.encode()
        document = Descriptor(WEIGHT_CONFIG, blobs.put_bytes(store, content), len(content), named(FILE))
        layers = [document if layer.media_type == WEIGHT_CONFIG else layer for layer in layers]
    return blobs.put_json(store, manifest(COMMIT, Descriptor(COMMIT, config, size), layers, subject))[0]
