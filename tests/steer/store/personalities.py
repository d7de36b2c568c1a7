"""What the tests of the store share: a working folder with a few small vectors."""

from __future__ import annotations

from pathlib import Path

import torch

from steer.store import creation
from steer.store.layout import Store
from steer.store.working import document, folder
from vectors.steering import SteeringVector

BASE = {
    "digest": "sha256:" + "a" * 64, "architecture": "LlamaForCausalLM", "hidden_size": 8, "layers": 4, "name": "pico",
}  # fmt: skip
NAMES = ("warm", "formal", "calm", "terse")


def vector(path: Path, seed: int, base: dict | None = None) -> Path:
    """A steering vector of random directions from a seed, at `path`."""
    generator = torch.Generator().manual_seed(seed)
    recommended = {"layers": [2], "strength": 1.5, "reason": "planted"}
    metadata = {"base": base or BASE, "apply": [2], "recommended": recommended}
    SteeringVector({i: torch.randn(8, generator=generator) for i in range(4)}, metadata).save(path)
    return path


def new_store(work: Path, branch: str = "tone") -> Store:
    """An empty store in `work`, with personality.yaml and four vectors beside it."""
    work.mkdir(parents=True, exist_ok=True)
    store = creation.create(work, branch)
    document.write(store.file, document.NEW.format(base="pico"))
    for seed, name in enumerate(NAMES):
        vector(work / f"{name}.safetensors", seed)
    return store


def commit(store: Store, message: str, **strengths: float | None) -> str:
    """Set the strengths of parts (None removes a part) and commit; returns the commit's digest."""
    for name, strength in strengths.items():
        if strength is None:
            document.edit(store.file, document.without_part(name))
        else:
            document.set_part(store.file, name, {"strength": strength})
    return folder.commit(store, message, "steer commit").digest
