"""Trying strengths: the same prompts side by side, whatever the tokenizer lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from probes import strengths as strengths_module
from probes.models import loading as loading
from probes.models.loading import LoadedModel
from probes.strengths import try_strengths
from vectors.errors import UsageError
from vectors.expression import parse
from vectors.steering import SteeringVector

VECTOR = {"warm": SteeringVector({1: torch.ones(32), 2: torch.ones(32)})}
PROMPTS = ["Hi", "What is warm and what is cold?"]


@pytest.fixture
def loaded(model_folder: Path) -> LoadedModel:
    return loading.load(str(model_folder), "cpu", "float32")


def tried(loaded: LoadedModel, prompts: list[str], strengths: tuple[float, ...] = (0, 3)) -> list[list[str]]:
    return try_strengths(loaded, parse("warm@response"), VECTOR, prompts, strengths, max_tokens=6)


def test_prompts_of_other_lengths_side_by_side_give_what_each_gives_alone(loaded: LoadedModel) -> None:
    together = tried(loaded, PROMPTS)
    assert together == [tried(loaded, [prompt])[0] for prompt in PROMPTS]
    assert together[0][0] != together[0][1]


def test_a_prompt_that_is_rendered_already_is_not_rendered_again(loaded: LoadedModel) -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tried(loaded, [turn]) == tried(loaded, ["Hi"])


def test_a_tokenizer_without_padding_or_end_is_no_obstacle(loaded: LoadedModel) -> None:
    expected = tried(loaded, PROMPTS)
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token = None
    assert tried(loaded, PROMPTS) == expected
    assert loaded.tokenizer.pad_token is None  # and it stays as it was


def test_prompts_beyond_the_context_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="exceed the model's context of 256"):
        tried(loaded, ["warm " * 300])


def test_many_prompts_run_in_several_batches_and_give_the_same(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = tried(loaded, [*PROMPTS, "And now?"])
    monkeypatch.setattr(strengths_module, "ROWS", 3)
    assert tried(loaded, [*PROMPTS, "And now?"]) == together
