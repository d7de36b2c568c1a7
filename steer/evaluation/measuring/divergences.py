"""How far each arm's predictions lie from the base's on neutral text: KL(base || arm) of every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.arms.neutral import TOKENS as NEUTRAL_TOKENS
from probes.arms.neutral import Divergence, continuations, summary
from probes.arms.scores import Completions
from probes.logits import completion_logits
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, memory_reported
from probes.scores.divergence import divergence
from probes.strengths import with_system
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.figures import TOGETHER, intervention, scores_of
from vectors.events import Event, OnEvent, ignore

STAGE = "measuring the divergence on neutral text"

__all__ = ["Divergence", "Neutral", "measure_divergences", "neutral_text", "summary"]


class Neutral(NamedTuple):
    """Neutral prompts, the base's continuation of each as ids, and both on the base, for many compositions."""

    prompts: list[str]
    continuations: list[list[int]]
    shared: Completions


def neutral_text(
    loaded: LoadedModel, prompts: Sequence[str], *, tokens: int = NEUTRAL_TOKENS, seed: int = 0,
    on_event: OnEvent = ignore,
) -> Neutral:  # fmt: skip
    """What the base, which is `loaded`, samples at temperature 1 after neutral prompts."""
    completions = continuations(loaded, prompts, tokens=tokens, seed=seed, on_event=on_event)
    written = [(prompt, each) for prompt, each in zip(prompts, completions, strict=True) if each.completion_ids]
    shared = Completions(loaded.model, [each for _, each in written], divergence=True)
    return Neutral(
        [prompt for prompt, _ in written],
        [list(each.completion_ids) for _, each in written],
        shared,
    )


def measure_divergences(
    loaded: LoadedModel, neutral: Neutral, arms: Sequence[Arm], *, any_base: bool = False, on_event: OnEvent = ignore
) -> list[Tensor]:
    """KL(base || arm) of every token of the neutral continuations, float64 [tokens], one tensor for each arm; in nats.

    The continuations are the base's own, so that all arms are compared on the same tokens; an arm with a system prompt
    reads them behind it. `loaded` is the model of all these arms. Raises as `measure_arms` does.
    """
    results: dict[int, Tensor] = {}
    quick = [i for i, arm in enumerate(arms) if arm.system is None and loaded.model is neutral.shared.model]
    for start in range(0, len(quick), TOGETHER):
        on_event(Event(STAGE, len(results), len(arms), "arms"))
        part = quick[start : start + TOGETHER]
        for index, scores in zip(part, scores_of(neutral.shared, [arms[i] for i in part], any_base), strict=True):
            results[index] = torch.cat(scores.divergences).clamp_min(0)
    others = [index for index in range(len(arms)) if index not in results]
    base = neutral.shared.unsteered_logits() if others else []
    for index in others:
        on_event(Event(STAGE, len(results), len(arms), "arms"))
        results[index] = _compared(loaded, neutral, base, arms[index], any_base)
    on_event(Event(STAGE, len(arms), len(arms), "arms"))
    return [results[index] for index in range(len(arms))]


def _compared(loaded: LoadedModel, neutral: Neutral, base: Sequence[Tensor], arm: Arm, any_base: bool) -> Tensor:
    """The divergences of an arm that reads other tokens, or is another model, from the logits of the base."""
    completions = _completions(neutral, arm.system, loaded.tokenizer)
    values: dict[int, Tensor] = {}
    with memory_reported():
        for index, logits in completion_logits(loaded.model, completions, intervention(loaded, arm, any_base)):
            values[index] = divergence(base[index], logits)
    return torch.cat([values[index] for index in range(len(values))])


def _completions(neutral: Neutral, system: str | None, tokenizer: Any) -> list[Completion]:
    ids = with_system(neutral.prompts, system, tokenizer)
    return [Completion(prompt, text) for prompt, text in zip(ids, neutral.continuations, strict=True)]
