"""Arms of an evaluation through vLLM: the same figures as `steer.evaluation.measuring`, all arms in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probes.models.completions import Completion
from probes.strengths import with_system
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.divergences import Neutral
from steer.evaluation.measuring.figures import figures_of
from steer.evaluation.measuring.rendering import rendered_items
from steer.evaluation.suites.items import Item
from steer.serving.offline.engine import OfflineEngine, Request


def measure_arms(
    engine: OfflineEngine, tokenizer: Any, items: Sequence[Item], arms: Sequence[Arm], *, context_length: int | None
) -> Tensor:
    """The figure of every item under every arm, float64 [arms, items], in nats, as the plain implementation's.

    The engine's model is that of all these arms. All completions under all arms are one batch. Raises ModelError, and
    as `steer.evaluation.measuring.figures.measure_arms` does.
    """
    by_system = {arm.system: rendered_items(items, tokenizer, context_length, arm.system) for arm in arms}
    requests = [
        request_of(completion, arm) for arm in arms for each in by_system[arm.system] for completion in each.completions
    ]
    sums = [sum(values) for values in engine.likelihoods(requests)]
    rows, start = [], 0
    for arm in arms:
        of_arm = by_system[arm.system]
        count = sum(len(each.completions) for each in of_arm)
        rows.append(figures_of(of_arm, sums[start : start + count]))
        start += count
    return torch.tensor(rows, dtype=torch.float64).reshape(len(arms), len(items))


def measure_divergences(engine: OfflineEngine, tokenizer: Any, neutral: Neutral, arms: Sequence[Arm]) -> list[Tensor]:
    """KL(base || arm) of every token of the neutral continuations, float64 [tokens], one tensor for each arm; in nats.

    Both distributions are vLLM's, over the whole vocabulary: exact, and the dearest part of an evaluation, since vLLM
    sorts the vocabulary at every position, of the prompts too. Raises ModelError.
    """
    by_system = {arm.system: with_system(neutral.prompts, arm.system, tokenizer) for arm in arms}
    plain = with_system(neutral.prompts, None, tokenizer)
    references = [
        request_of(Completion(prompt, text)) for prompt, text in zip(plain, neutral.continuations, strict=True)
    ]
    requests = [
        (number, request_of(Completion(prompt, text), arm))
        for arm in arms
        for number, (prompt, text) in enumerate(zip(by_system[arm.system], neutral.continuations, strict=True))
    ]
    values = iter(engine.divergences(references, requests))
    return [torch.tensor([value for _ in neutral.prompts for value in next(values)], dtype=torch.float64) for _ in arms]


def generate(
    engine: OfflineEngine, tokenizer: Any, prompts: Sequence[str], arms: Sequence[Arm], *, tokens: int
) -> list[list[Completion]]:
    """The greedy completion of every prompt under every arm, [arms][prompts], from one batch."""
    by_system = {arm.system: with_system(prompts, arm.system, tokenizer) for arm in arms}
    requests = [Request(ids, 0, arm.composition, arm.vectors) for arm in arms for ids in by_system[arm.system]]
    written = iter(engine.generate(requests, tokens))
    return [[Completion(ids, next(written)) for ids in by_system[arm.system]] for arm in arms]


def request_of(completion: Completion, arm: Arm | None = None) -> Request:
    """A prompt with a given completion, under an arm."""
    given = len(completion.completion_ids)
    return Request(completion.ids, given, *((arm.composition, arm.vectors) if arm else ()))
