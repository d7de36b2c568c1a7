"""A pico Llama with vectors, and the engine that most tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_process import Engines, random_vectors, save_model, write_settings
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def model_path(folder: Path) -> Path:
    return save_model(folder, "llama")


@pytest.fixture(scope="session")
def vectors(folder: Path) -> dict[str, Path]:
    return random_vectors(folder)


@pytest.fixture(scope="session")
def settings(folder: Path, vectors: dict[str, Path]) -> Path:
    return write_settings(folder, vectors)


@pytest.fixture(scope="session")
def model(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path).eval()


@pytest.fixture
def engine(engines: Engines, model_path: Path, settings: Path) -> Engines:
    """An engine as every test but those with settings of their own uses it: the one that runs, if it is such a one."""
    if engines.running != (model_path, settings, {}):
        engines.start(model_path, settings)
    return engines
