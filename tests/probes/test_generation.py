"""One way to generate: whatever batch and order the prompts come in, each has its own completion."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest

from probes import generation
from probes.generation import generate
from probes.models import loading
from probes.models.completions import Completion
from probes.models.loading import LoadedModel

PROMPTS = pico.sequences(5, 3, 12, seed=3)
NAMES = [f"prompt {index}" for index in range(5)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = pico.save(tmp_path_factory.mktemp("generation") / "model", "llama")
    return loading.load(str(folder), "cpu", "float32")


def completed(loaded: LoadedModel, order: list[int], temperature: float = 1.0, seed: int = 0) -> dict[int, Completion]:
    made = generate(
        loaded.model, loaded.tokenizer, [PROMPTS[i] for i in order], max_tokens=6, temperature=temperature, seed=seed,
        names=[NAMES[i] for i in order],
    )  # fmt: skip
    return dict(zip(order, made, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_completion_depends_on_neither_its_batch_nor_its_order(
    loaded: LoadedModel, temperature: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {i: completed(loaded, [i], temperature)[i] for i in range(5)}
    monkeypatch.setattr(generation, "BATCH", batch)
    assert completed(loaded, [0, 1, 2, 3, 4], temperature) == alone
    assert completed(loaded, [3, 1, 4, 0, 2], temperature) == alone


def test_a_completion_follows_from_the_seed_and_the_name(loaded: LoadedModel) -> None:
    assert completed(loaded, [0, 1]) == completed(loaded, [0, 1])
    assert completed(loaded, [0, 1]) != completed(loaded, [0, 1], seed=1)
    same = generate(
        loaded.model, loaded.tokenizer, [PROMPTS[0]] * 3, max_tokens=6, temperature=1.0, names=["a", "a", "b"]
    )
    assert same[0] == same[1] != same[2]


def test_a_completion_keeps_its_prompt_and_ends_with_its_end_token(loaded: LoadedModel) -> None:
    (free,) = generate(loaded.model, loaded.tokenizer, PROMPTS[:1], max_tokens=6)
    assert free.prompt_ids == PROMPTS[0]
    assert free.ids == [*PROMPTS[0], *free.completion_ids]
    assert free.length == len(free.ids)
    third = free.completion_ids[2]
    before, loaded.model.generation_config.eos_token_id = loaded.model.generation_config.eos_token_id, third
    try:
        (ended,) = generate(loaded.model, loaded.tokenizer, PROMPTS[:1], max_tokens=6)
    finally:
        loaded.model.generation_config.eos_token_id = before
    assert ended.completion_ids == free.completion_ids[: list(free.completion_ids).index(third) + 1]


def test_no_tokens_give_empty_completions(loaded: LoadedModel) -> None:
    assert generate(loaded.model, loaded.tokenizer, PROMPTS[:2], max_tokens=0) == [
        Completion(prompt, []) for prompt in PROMPTS[:2]
    ]
