"""Answers of a paired experiment through vLLM: all arms on all prompts are one batch, each steered in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from probes.models.markers import given_markers
from steer.experiments.paired.answers import Answer, rows_of, seed_of
from steer.experiments.paired.inputs import Inputs
from steer.experiments.paired.request import Request
from steer.serving.offline.arms import text_of
from steer.serving.offline.engine import OfflineEngine, Written, offline_engine
from steer.serving.offline.engine import Request as Text
from steer.serving.offline.needs import require_possible, settings_for
from vectors.events import Event, OnEvent


def write(inputs: Inputs, request: Request, on_event: OnEvent) -> dict[str, list[Answer]]:
    """The answers of every arm to every row.

    Raises UsageError where vLLM is not installed or can't run an arm, ModelError.
    """
    settings = settings_for(inputs.arms, inputs.markers)
    require_possible(inputs.arms, settings, given_markers(inputs.opened.tokenizer, inputs.markers))
    adapters = [Path(arm.model) for arm in inputs.arms if arm.model is not None]
    on_event(Event("starting vLLM"))
    longest = inputs.longest + request.max_tokens
    path = inputs.opened.source.path
    with offline_engine(path, settings, max_tokens=longest, dtype=request.dtype, adapters=adapters) as engine:
        written = texts_of(engine, inputs, request, on_event)
        scores = {} if adapters else _likelihoods(engine, inputs, request, written, on_event)
    if adapters and request.likelihood:
        # vLLM 0.32 fails on a CPU where an engine with adapters scores the tokens of a prompt.
        with offline_engine(path, settings, max_tokens=longest, dtype=request.dtype) as engine:
            scores = _likelihoods(engine, inputs, request, written, on_event)
    tokenizer = inputs.opened.tokenizer
    return {
        arm.name: [
            Answer(
                tokenizer.decode(each.ids, skip_special_tokens=True).strip(), each.ids,
                scores.get((row.prompt, tuple(each.ids))), each.gates or None,
            )
            for row, each in zip(rows_of(inputs, request), written[arm.name], strict=True)
        ]
        for arm in inputs.arms
    }  # fmt: skip


def texts_of(engine: OfflineEngine, inputs: Inputs, request: Request, on_event: OnEvent) -> dict[str, list[Written]]:
    """Every arm's answers, in the order of `rows_of`."""
    rows = rows_of(inputs, request)
    written: dict[str, list[Written]] = {}
    engine.progress = lambda done, total: on_event(Event("writing answers", done, total, "answers"))
    # On a CPU, vLLM 0.32 applies an adapter to every request of a batch, so each adapter has a batch of its own.
    for adapter in dict.fromkeys(arm.model for arm in inputs.arms):
        arms = [arm for arm in inputs.arms if arm.model == adapter]
        texts = [text_of(inputs.prompt_ids[arm.system][row.prompt], arm=arm) for arm in arms for row in rows]
        # The same seed for every arm: vLLM draws a request's tokens from a generator of its own.
        seeds = [seed_of(row, request.seed) for _ in arms for row in rows] if request.temperature > 0 else []
        found = engine.generate(texts, request.max_tokens, temperature=request.temperature, seeds=seeds)
        written |= {arm.name: found[i * len(rows) : (i + 1) * len(rows)] for i, arm in enumerate(arms)}
    return written


def _likelihoods(
    engine: OfflineEngine, inputs: Inputs, request: Request, written: Mapping[str, Sequence[Written]],
    on_event: OnEvent,
) -> dict[tuple[int, tuple[int, ...]], float]:  # fmt: skip
    """The mean log-likelihood of every answer under the model as it is, by prompt and answer; equal ones are one."""
    if not request.likelihood:
        return {}
    rows = rows_of(inputs, request)
    engine.progress = lambda done, total: on_event(Event("scoring answers", done, total, "answers"))
    answers = dict.fromkeys(
        (row.prompt, tuple(each.ids))
        for listed in written.values()
        for row, each in zip(rows, listed, strict=True)
        if each.ids
    )
    texts = [Text([*inputs.prompt_ids[None][prompt], *ids], len(ids)) for prompt, ids in answers]
    found = engine.likelihoods(texts)
    return {answer: sum(values) / len(values) for answer, values in zip(answers, found, strict=True)}
