"""What all tests of training share."""

from __future__ import annotations

import pytest

from steer.training.data import sampling


@pytest.fixture(autouse=True)
def random_models_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model with random weights says is no text to anybody."""
    monkeypatch.setattr(sampling, "PERPLEXITY", 1e9)
    monkeypatch.setattr(sampling, "REPEATED", 1.0)
