"""What all tests of training share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest
import torch
from bakes import WORDS
from forked import Forking

from steer.training.data import filtering
from vectors.steering import SteeringVector


@pytest.fixture(autouse=True)
def random_models_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model with random weights says is no text to anybody."""
    monkeypatch.setattr(filtering, "PERPLEXITY", 1e9)
    monkeypatch.setattr(filtering, "REPETITION", 1.0)


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """Processes that begin with the libraries of training loaded."""
    process = Forking(tmp_path_factory.mktemp("printed"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(4))
    return SteeringVector({1: 4 * direction / direction.norm()})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{a} {b}?"}) for a in WORDS[:6] for b in WORDS[6:]))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _two_classes(tmp_path_factory.mktemp("texts"), "?")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As `texts`, but none of the same examples."""
    return _two_classes(tmp_path_factory.mktemp("held-out"), "!")


def _two_classes(place: Path, end: str) -> tuple[Path, Path]:
    sides = []
    for name, word in (("warm", " the warm and"), ("cold", " the cold no")):
        file = place / f"{name}.jsonl"
        lines = [{"prompt": f"{a} {b}{end}", "completion": f"{word} {b}{word}"} for a in WORDS[:5] for b in WORDS[5:]]
        file.write_text("\n".join(map(json.dumps, lines)))
        sides.append(file)
    return sides[0], sides[1]
