"""A current folder with examples, and a vector that was extracted from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import COLD, WARM, Outcome


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two files of examples, of unequal length."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("warm", WARM), ("cold", COLD[:10])):
        lines = [json.dumps({"text": f"{text} {number}"}) for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


EXTRACTED: dict[Path, dict[str, bytes]] = {}  # by model: what an extraction from the examples of `data` writes


@pytest.fixture
def extracted(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> Path:
    """`warm.safetensors` in the current folder, extracted once for all tests: the files do not depend on the folder."""
    if model_folder not in EXTRACTED:
        before = set(data.iterdir())
        code, _, err = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder)
        assert code == 0, err
        EXTRACTED[model_folder] = {path.name: path.read_bytes() for path in set(data.iterdir()) - before}
    for name, content in EXTRACTED[model_folder].items():
        (data / name).write_bytes(content)
    return data / "warm.safetensors"


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
