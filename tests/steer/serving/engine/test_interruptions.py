"""Requests that are interrupted at any step, and begin again: scopes still count from the true prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
from engine_process import Engines, reference
from test_parity import CLOSE

from vectors.expression import parse

pytestmark = pytest.mark.on_v2

TOKENS = 5
STEERING = ("2*warm@response", "2*warm@prompt + calm@first:70", None, "formal@after:71 + ablate(calm)")
STEPS = 7  # of the requests below: the prompts in pieces of 48 tokens, then a token a step


@pytest.fixture(scope="module")
def jobs() -> list[dict[str, Any]]:
    """The first prompt takes more than one step; the scopes of the others end within their responses."""
    prompts = [*pico.sequences(1, 60, 60, seed=31), *pico.sequences(3, 8, 8, seed=32)]
    scopes = [steer and steer.replace("70", "10").replace("71", "11") for steer in STEERING]
    return [
        {"ids": ids, "steer": steer, "tokens": TOKENS, "unscored": True}
        for ids, steer in zip(prompts, scopes, strict=True)
    ]


@pytest.fixture
def small_steps(engines: Engines, model_path: Path, settings: Path) -> Engines:
    """An engine that computes at most 48 tokens in a step."""
    arguments = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}
    if engines.running != (model_path, settings, arguments):
        engines.start(model_path, settings, **arguments)
    return engines


def require_right(answer: dict[str, Any], job: dict[str, Any], model: Any, vectors: dict[str, Path]) -> None:
    """The answer is that of the hooked model, and its receipt counts every token once, from the true prompt."""
    prompt, steer = len(job["ids"]), job["steer"]
    expected = reference(model, job["ids"], answer["ids"], steer, vectors)[prompt - 1 :]
    assert max(abs(a - b) for a, b in zip(answer["scores"], expected, strict=True)) < CLOSE
    if steer is None:
        assert answer["receipt"] is None
        return
    assert (answer["receipt"]["prompt_tokens"], answer["receipt"]["response_tokens"]) == (prompt, TOKENS - 1)
    for term, counted in zip(parse(steer).terms, answer["receipt"]["terms"], strict=True):
        start, stop = term.scope.span(prompt) if term.scope else (0, prompt + TOKENS)
        covered = [position for position in range(prompt + TOKENS - 1) if start <= position < stop]
        assert counted["prompt_tokens"] == sum(position < prompt for position in covered)
        assert counted["response_tokens"] == sum(position >= prompt for position in covered)


def test_a_preemption_after_any_step_changes_nothing_and_counts_no_token_twice(
    small_steps: Engines, jobs: list[dict[str, Any]], model: Any, vectors: dict[str, Path]
) -> None:
    before = small_steps.call("state")["preempted"]
    for step in range(1, STEPS):
        steps = [{"add": job, "id": str(i)} for i, job in enumerate(jobs)]
        answers = small_steps.call("script", steps=[*steps, {"step": step}, {"preempt": True}])["answers"]
        for i, job in enumerate(jobs):
            require_right(answers[str(i)], job, model, vectors)
    assert small_steps.call("state")["preempted"] >= before + 2 * (STEPS - 1), "at least two requests ran each time"


def test_a_request_that_is_aborted_after_any_step_and_sent_again_is_answered_as_if_it_were_new(
    small_steps: Engines, jobs: list[dict[str, Any]], model: Any, vectors: dict[str, Path]
) -> None:
    """It finds its own prompt in the prefix cache, or a part of it."""
    for step in range(1, STEPS):
        steps: list[dict[str, Any]] = [{"add": job, "id": str(i)} for i, job in enumerate(jobs)]
        steps += [{"step": step}, {"abort": "0"}, {"abort": "1"}]
        steps += [{"add": jobs[0], "id": "0"}, {"add": {**jobs[1], "steer": "2*formal@response"}, "id": "1"}]
        answers = small_steps.call("script", steps=steps)["answers"]
        for i, job in enumerate(jobs):
            require_right(answers[str(i)], {**job, "steer": "2*formal@response"} if i == 1 else job, model, vectors)
    small_steps.generate([{"ids": [5, 6, 7]}])  # the worker hears of the end of a request with the next step
    end = small_steps.call("state")
    assert (end["capacity"]["rows_held"], end["worker"]["rows_held"], end["progress"]) == (0, 0, 0)
