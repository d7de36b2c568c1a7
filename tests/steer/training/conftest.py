"""What all tests of training share."""

from __future__ import annotations

import pytest

from steer.training.data import filtering


@pytest.fixture(autouse=True)
def random_models_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model with random weights says is no text to anybody."""
    monkeypatch.setattr(filtering, "PERPLEXITY", 1e9)
    monkeypatch.setattr(filtering, "REPETITION", 1.0)
