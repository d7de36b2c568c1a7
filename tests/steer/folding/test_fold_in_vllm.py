"""vLLM computes with a folded model what the steered one does, and a proof fails where it does not."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest
from engine_process import Engines
from test_fold import fold, vectors

from steer.folding import proof
from steer.folding.vllm_scores import Scores
from vectors.errors import SteerError

# heads as large as vLLM's CPU attention wants them
SIZE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}


@contextlib.contextmanager
def loading(stock: Engines, written: Path, max_tokens: int) -> Iterator[Scores]:
    """As the proof's own, in a process that is there already."""
    stock.start(written, max_model_len=max_tokens + 1, enable_prefix_caching=False)
    yield lambda rows: [a["prompt_scores"] for a in stock.generate([{"ids": [*row], "tokens": 1} for row in rows])]


@pytest.mark.parametrize(("name", "via"), [("llama", "bias"), ("qwen2", "llama"), ("qwen3", "layer")])
def test_vllm_serves_what_was_folded(
    name: str, via: str, stock: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first in a process that the proof starts; the others in one that is there."""

    if via != "bias":
        monkeypatch.setattr(proof.vllm_scores, "loading", functools.partial(loading, stock))
    folder = pico.save(tmp_path / "model", name, **SIZE)
    report = fold(folder, "warm", tmp_path / "out", via=via, vectors=vectors(128), vllm=None)
    assert report["proof"]["vllm"]["max_log_probability"] < 5e-4
    assert report["proof"]["vllm"]["tokens"] > 30
    assert json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["proof"] == report["proof"]


def test_a_bias_that_vllm_drops_fails_the_proof(
    stock: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama whose configuration lacks the flag only for vLLM: transformers loads the bias, vLLM does not see it."""
    folder = pico.save(tmp_path / "model", "llama", **SIZE)

    @contextlib.contextmanager
    def unflagged(written: Path, max_tokens: int) -> Iterator[Scores]:
        copy = shutil.copytree(written, tmp_path / "copy")
        config = json.loads((copy / "config.json").read_text()) | {"mlp_bias": False}
        (copy / "config.json").write_text(json.dumps(config))
        with loading(stock, copy, max_tokens) as scores:
            yield scores

    monkeypatch.setattr(proof.vllm_scores, "loading", unflagged)
    with pytest.raises(SteerError, match="the proof failed"):
        fold(folder, "warm", tmp_path / "out", vectors=vectors(128), vllm=None)
    assert not (tmp_path / "out").exists()
