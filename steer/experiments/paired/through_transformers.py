"""Answers through transformers: the arms of a prompt are rows of one batch, each steered in its own way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from probes.gates import Decided, Decisions
from probes.generation import generate_batch
from probes.logits import completion_logits
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, load, memory_reported
from probes.scores import Measured, likelihood
from probes.steered import steered
from steer.evaluation.arms.arm import Arm
from steer.evaluation.arms.weights import loaded_arm
from steer.experiments.paired.answers import Answer, Row, rows_of
from steer.experiments.paired.inputs import Inputs
from steer.experiments.paired.request import Request
from vectors.events import Event, OnEvent
from vectors.expression import Composition

ROWS = 64  # of a batch


def write(inputs: Inputs, request: Request, on_event: OnEvent) -> dict[str, list[Answer]]:
    """The answers of every arm to every row. Raises ModelError, also when memory runs out."""
    on_event(Event("loading the model"))
    base = load(inputs.opened, request.device, request.dtype, inputs.markers)
    on_event(Event("loading the model", message=f"model {base.source}, on {base.choice}"))
    rows, completions = rows_of(inputs, request), dict[str, list[_Written]]()
    groups: dict[str, list[Arm]] = {}
    for arm in inputs.arms:
        groups.setdefault(arm.model or "", []).append(arm)
    for folder, arms in groups.items():
        model = loaded_arm(base, arms[0], request.device, request.dtype) if folder else base
        completions |= _written(model, arms, inputs, request, rows, on_event)
    written = {arm.name: completions[arm.name] for arm in inputs.arms}
    plain = {name: [each.completion for each in listed] for name, listed in written.items()}
    scores = likelihoods(base, inputs, rows, plain if request.likelihood else {}, on_event)
    return {
        name: [
            Answer(
                base.tokenizer.decode(list(each.completion.completion_ids), skip_special_tokens=True).strip(),
                list(each.completion.completion_ids), score, [_gate(decided) for decided in each.decided] or None,
            )
            for each, score in zip(listed, scores.get(name, [None] * len(rows)), strict=True)
        ]
        for name, listed in written.items()
    }  # fmt: skip


class _Written(NamedTuple):
    """A completion, and what each condition decided for it."""

    completion: Completion
    decided: list[Decided]


def _gate(decided: Decided) -> dict[str, Any]:
    """What a condition decided, as a server's receipt has it."""
    value = None if math.isnan(decided.value) else decided.value
    return {"condition": decided.condition, "value": value, "held": decided.held, "read": decided.read}


def _written(
    loaded: LoadedModel, arms: Sequence[Arm], inputs: Inputs, request: Request, rows: Sequence[Row], on_event: OnEvent
) -> dict[str, list[_Written]]:
    """The completions of arms that share a model's weights: every batch holds all of them on the same rows."""
    completions: dict[str, list[_Written]] = {arm.name: [] for arm in arms}
    compositions = [arm.composition or Composition(()) for arm in arms]
    vectors = {name: vector for arm in arms for name, vector in arm.vectors.items()}
    probes = {name: source for arm in arms for name, source in arm.probes.items()}
    size = max(1, ROWS // len(arms))
    for start in range(0, len(rows), size):
        on_event(Event("writing answers", start * len(arms), len(rows) * len(arms), "answers"))
        part, seen = rows[start : start + size], list[Decisions]()

        @contextmanager
        def steering(_lengths: Sequence[int], count: int = len(part), seen: list[Decisions] = seen) -> Iterator[object]:
            with steered(
                loaded.model, compositions * count, vectors=vectors, probes=probes, any_base=request.any_base
            ) as decisions:
                seen.append(decisions)
                yield decisions

        batch = generate_batch(
            loaded.model, loaded.tokenizer, [inputs.prompt_ids[arm.system][row.prompt] for row in part for arm in arms],
            steering, max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed,
            names=[row.name for row in part for _ in arms],
        )  # fmt: skip
        for index, completion in enumerate(batch):
            arm = arms[index % len(arms)]
            conditions = arm.composition.conditions if arm.composition is not None else ()
            decided = seen[0].of_row(index, len(completion.completion_ids)) if conditions else []
            by_condition = {each.condition: each for each in decided}
            completions[arm.name].append(_Written(completion, [by_condition[str(each)] for each in conditions]))
    on_event(Event("writing answers", len(rows) * len(arms), len(rows) * len(arms), "answers"))
    return completions


def likelihoods(
    base: LoadedModel, inputs: Inputs, rows: Sequence[Row], written: dict[str, list[Completion]], on_event: OnEvent
) -> dict[str, list[float | None]]:
    """The mean log-likelihood of every answer under the unsteered model without a system prompt; equal ones are one."""
    plain = {
        (row.prompt, tuple(each.completion_ids)): Completion(inputs.prompt_ids[None][row.prompt], each.completion_ids)
        for listed in written.values()
        for row, each in zip(rows, listed, strict=True)
        if each.completion_ids
    }
    found: dict[tuple[int, tuple[int, ...]], float] = {}
    keys, texts = list(plain), list(plain.values())
    with memory_reported():
        for index, logits in completion_logits(base.model, texts):
            found[keys[index]] = likelihood.score(Measured(texts[index], logits))
            on_event(Event("scoring answers", len(found), len(texts), "answers"))
    return {
        name: [found.get((row.prompt, tuple(each.completion_ids))) for row, each in zip(rows, listed, strict=True)]
        for name, listed in written.items()
    }
