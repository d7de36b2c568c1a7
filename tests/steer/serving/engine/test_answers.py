"""Every form of an answer under steering: scores of prompts, several answers, streams, and answers of a given form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_process import Engines, reference
from test_parity import CLOSE

from probes.steered import steered
from vectors.steering import SteeringVector

pytestmark = pytest.mark.on_v2

STEERING = (None, "2*warm@prompt", "2*warm@response", "ablate(warm) + formal@first:8")


def furthest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def scores_of(
    model: Any, ids: list[int], response: list[int], steer: str | None, vectors: dict[str, Path]
) -> torch.Tensor:
    """The hooked model's logits at every token but the last, [tokens, vocabulary], float64."""
    bound = {name: SteeringVector.load(path) for name, path in vectors.items()}
    whole = torch.tensor([[*ids, *response]])
    with torch.no_grad(), steered(model, steer or "0*warm", vectors=bound, prompt_length=len(ids)):
        logits: torch.Tensor = model(input_ids=whole, use_cache=False).logits
    return logits[0, :-1].double()


def test_the_likeliest_tokens_of_a_prompt_are_those_of_the_hooked_model(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    """Also of a prompt that is in the prefix cache, of which vLLM must compute all tokens again for their scores."""
    for steer, ids in zip(STEERING, pico.sequences(len(STEERING), 70, 70, seed=21), strict=True):
        job = {"ids": ids, "steer": steer, "tokens": 1}
        engine.generate([{**job, "unscored": True}])
        answer = engine.generate([{**job, "top": 5}])[0]
        assert answer["cached"] == 0
        scores = scores_of(model, ids, answer["ids"], steer, vectors).log_softmax(-1)[: len(ids) - 1]
        for entry, row in zip(answer["prompt_top"], scores, strict=True):
            assert {int(token) for token in entry} >= set(row.topk(5).indices.tolist())
            assert all(abs(score - float(row[int(token)])) < CLOSE for token, score in entry.items())


def test_each_of_several_answers_is_steered_as_the_hooked_model_is(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    prompts = pico.sequences(len(STEERING), 8, 20, seed=22)
    # At a temperature of 1, the scores are those of the model.
    jobs = [
        {"ids": ids, "steer": steer, "n": 3, "temperature": 1.0, "seed": 5, "tokens": 6, "unscored": True}
        for ids, steer in zip(prompts, STEERING, strict=True)
    ]
    for job, answer in zip(jobs, engine.generate(jobs), strict=True):
        assert len({tuple(ids) for ids in answer["all"]}) == 3
        for ids, scores in zip(answer["all"], answer["all_scores"], strict=True):
            expected = reference(model, job["ids"], ids, job["steer"], vectors)[len(job["ids"]) - 1 :]
            assert furthest(scores, expected) < CLOSE
        counts = [receipt and receipt["response_tokens"] for receipt in answer["receipts"]]
        assert counts == [None if job["steer"] is None else 5] * 3


def test_a_stream_is_the_answer_in_pieces_and_its_receipt_comes_last(engine: Engines) -> None:
    prompts = pico.sequences(len(STEERING), 8, 40, seed=23)
    jobs = [
        {"ids": ids, "steer": steer, "unscored": True, "tokens": tokens}
        for ids, steer, tokens in zip(prompts, STEERING, (3, 6, 8, 1), strict=True)
    ]
    whole = engine.generate(jobs)
    for job, events, answer in zip(jobs, engine.call("stream", jobs=jobs), whole, strict=True):
        assert [token for event in events for token in event["ids"]] == answer["ids"]
        assert len(events) == job["tokens"], "a piece for each token"
        assert [event["finished"] for event in events] == [False] * (len(events) - 1) + [True]
        assert all(event["receipt"] is None for event in events[:-1])
        receipt = events[-1]["receipt"]
        if job["steer"] is None:
            assert receipt is None
        else:
            assert receipt["terms"] == answer["receipt"]["terms"]
            assert receipt["response_tokens"] == job["tokens"] - 1


def test_an_answer_of_a_given_form_is_steered_and_scored_among_the_tokens_of_the_form(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    """Beside it runs a request without a form."""
    digits = [pico.tokenizer().convert_tokens_to_ids(digit) for digit in "0123456789"]
    prompts = pico.sequences(len(STEERING), 8, 20, seed=24)
    jobs = [
        {"ids": ids, "steer": steer, "tokens": 6, "unscored": True, "structured": {"regex": "[0-9]{3}"}}
        for ids, steer in zip(prompts, STEERING, strict=True)
    ]
    free = {"ids": prompts[0], "steer": "2*warm", "tokens": 6, "unscored": True}
    *answers, beside = engine.generate([*jobs, free])
    assert (
        furthest(
            beside["scores"], reference(model, prompts[0], beside["ids"], "2*warm", vectors)[len(prompts[0]) - 1 :]
        )
        < CLOSE
    )
    for job, answer in zip(jobs, answers, strict=True):
        assert answer["reason"] == "stop"
        assert len(answer["ids"]) == 4
        assert set(answer["ids"][:3]) <= set(digits)
        logits = scores_of(model, job["ids"], answer["ids"], job["steer"], vectors)[len(job["ids"]) - 1 :][:3, digits]
        chosen = torch.tensor([[digits.index(token)] for token in answer["ids"][:3]])
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        assert furthest(answer["scores"][:3], expected.tolist()) < CLOSE
        assert job["steer"] is None or answer["receipt"]["response_tokens"] == len(answer["ids"]) - 1


@pytest.mark.parametrize(
    "form", [{"choice": [" yes", " no"]}, {"json": {"enum": ["warm", "cold"]}}], ids=["choice", "json"]
)
def test_an_answer_has_the_form_that_was_requested(form: dict[str, Any], engine: Engines) -> None:
    """The tokens are decoded here: vLLM's text begins with a piece of a prompt that ends within a letter of UTF-8."""
    tokenizer = pico.tokenizer()
    jobs = [
        {"ids": ids, "steer": steer, "tokens": 16, "unscored": True, "structured": form}
        for ids, steer in zip(pico.sequences(len(STEERING), 8, 20, seed=25), STEERING, strict=True)
    ]
    for answer in engine.generate(jobs):
        assert answer["reason"] == "stop"
        text = tokenizer.decode(answer["ids"][:-1])
        assert text in form["choice"] if "choice" in form else json.loads(text) in form["json"]["enum"]
