"""Answers of a paired experiment through vLLM: all arms on all prompts are one batch, each steered in its own way."""

from __future__ import annotations

from pathlib import Path

from steer.evaluation.arms.arm import Arm
from steer.experiments.paired.answers import Answer, rows_of, seed_of
from steer.experiments.paired.inputs import Inputs
from steer.experiments.paired.request import Request
from steer.serving.offline.engine import OfflineEngine, offline_engine
from steer.serving.offline.engine import Request as Text
from vectors.events import Event, OnEvent


def write(inputs: Inputs, request: Request, on_event: OnEvent) -> dict[str, list[Answer]]:
    """The answers of every arm to every row. Raises UsageError where vLLM is not installed, ModelError."""
    adapters = [Path(arm.model) for arm in inputs.arms if arm.model is not None]
    on_event(Event("starting vLLM"))
    with offline_engine(
        inputs.opened.source.path, max_tokens=inputs.longest + request.max_tokens, dtype=request.dtype,
        adapters=adapters,
    ) as engine:  # fmt: skip
        return _write(engine, inputs, request, on_event)


def _write(engine: OfflineEngine, inputs: Inputs, request: Request, on_event: OnEvent) -> dict[str, list[Answer]]:
    rows, tokenizer = rows_of(inputs, request), inputs.opened.tokenizer
    texts = [
        Text(inputs.prompt_ids[arm.system][row.prompt], 0, arm.composition, arm.vectors, _adapter(arm))
        for arm in inputs.arms
        for row in rows
    ]
    # The same seed for every arm: vLLM draws a request's tokens from a generator of its own.
    seeds = [seed_of(row, request.seed) for _ in inputs.arms for row in rows] if request.temperature > 0 else []
    engine.progress = lambda done, total: on_event(Event("writing answers", done, total, "answers"))
    written = engine.generate(texts, request.max_tokens, temperature=request.temperature, seeds=seeds)
    engine.progress = lambda done, total: on_event(Event("scoring answers", done, total, "answers"))
    prompt_of = [row.prompt for _ in inputs.arms for row in rows]
    keys = list(dict.fromkeys((prompt, tuple(ids)) for prompt, ids in zip(prompt_of, written, strict=True) if ids))
    scored = engine.likelihoods([Text([*inputs.prompt_ids[None][prompt], *ids], len(ids)) for prompt, ids in keys])
    likelihood = {key: sum(values) / len(values) for key, values in zip(keys, scored, strict=True)}
    answers = [
        Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, likelihood.get((prompt, tuple(ids))))
        for prompt, ids in zip(prompt_of, written, strict=True)
    ]
    return {arm.name: answers[i * len(rows) : (i + 1) * len(rows)] for i, arm in enumerate(inputs.arms)}


def _adapter(arm: Arm) -> Path | None:
    return None if arm.model is None else Path(arm.model)
