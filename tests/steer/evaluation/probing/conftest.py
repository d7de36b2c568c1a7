"""The planted model, built once, and files of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from planted_texts import lines, planted


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., Path]:
    """A file of texts that hold a word: `texts(word, count, seed)`."""

    def write(word: str, count: int, seed: int, prompts: bool = False) -> Path:
        return lines(tmp_path / f"{word.strip()}-{seed}.jsonl", word, count, seed, prompts)

    return write
