"""A base and three fine-tunes on disk, and a cache of their own for what merging remembers."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests and places of bases are remembered outside the real cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders `base`, `a` (one file), `b` (three shards) and `c`, bfloat16, in the current folder."""
    monkeypatch.chdir(tmp_path)
    base = folders.weights(0)
    folders.write(tmp_path / "base", base, tokenizer=True)
    for seed, name in enumerate("abc", 1):
        folders.write(tmp_path / name, folders.tuned(base, seed), shards=3 if name == "b" else 1)
    return tmp_path
