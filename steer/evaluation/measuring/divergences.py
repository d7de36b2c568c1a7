"""How far each arm's predictions lie from the base's on neutral text: KL(base || arm) of every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.generation import generate
from probes.logits import completion_logits
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, memory_reported
from probes.models.tokens import rendered
from probes.scores.divergence import divergence
from probes.strengths import with_system
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.figures import intervention
from vectors.events import Event, OnEvent, ignore

STAGE = "measuring the divergence on neutral text"
NEUTRAL_TOKENS = 32
PERCENTILE = 0.95


class Neutral(NamedTuple):
    """Neutral prompts, the base's continuation of each as ids, and its logits before each token of it."""

    prompts: list[str]
    continuations: list[list[int]]
    logits: list[Tensor]  # float32 [tokens of the continuation, vocabulary], one for each


class Divergence(NamedTuple):
    """KL(base || arm) per token on neutral text, in nats: mean, 95th percentile and root mean square over tokens."""

    mean: float
    p95: float
    rms: float
    tokens: int


def neutral_text(
    loaded: LoadedModel, prompts: Sequence[str], *, tokens: int = NEUTRAL_TOKENS, seed: int = 0,
    on_event: OnEvent = ignore,
) -> Neutral:  # fmt: skip
    """What the base, which is `loaded`, samples at temperature 1 after neutral prompts, and its predictions there."""
    ids = rendered(prompts, loaded.tokenizer)
    completions = generate(
        loaded.model, loaded.tokenizer, ids, max_tokens=tokens, temperature=1.0, seed=seed, names=list(prompts),
        stage="continuing the neutral prompts", on_event=on_event,
    )  # fmt: skip
    written = [(prompt, each) for prompt, each in zip(prompts, completions, strict=True) if each.completion_ids]
    with memory_reported():
        logits = dict(completion_logits(loaded.model, [each for _, each in written]))
    return Neutral(
        [prompt for prompt, _ in written],
        [list(each.completion_ids) for _, each in written],
        [logits[index] for index in range(len(written))],
    )


def measure_divergences(
    loaded: LoadedModel, neutral: Neutral, arms: Sequence[Arm], *, any_base: bool = False, on_event: OnEvent = ignore
) -> list[Tensor]:
    """KL(base || arm) of every token of the neutral continuations, float64 [tokens], one tensor for each arm; in nats.

    The continuations are the base's own, so that all arms are compared on the same tokens; an arm with a system prompt
    reads them behind it. `loaded` is the model of all these arms. Raises as `measure_arms` does.
    """
    by_system = {arm.system: _completions(neutral, arm.system, loaded.tokenizer) for arm in arms}
    divergences = []
    for position, arm in enumerate(arms):
        on_event(Event(STAGE, position, len(arms), "arms"))
        values: dict[int, Tensor] = {}
        with memory_reported():
            for index, logits in completion_logits(
                loaded.model, by_system[arm.system], intervention(loaded, arm, any_base)
            ):
                values[index] = divergence(neutral.logits[index], logits)
        divergences.append(torch.cat([values[index] for index in range(len(values))]))
    on_event(Event(STAGE, len(arms), len(arms), "arms"))
    return divergences


def summary(values: Tensor) -> Divergence:
    """Mean, 95th percentile and root mean square of the divergences [tokens]."""
    return Divergence(
        float(values.mean()), float(values.quantile(PERCENTILE)), float(values.square().mean().sqrt()), len(values)
    )


def _completions(neutral: Neutral, system: str | None, tokenizer: Any) -> list[Completion]:
    ids = with_system(neutral.prompts, system, tokenizer)
    return [Completion(prompt, text) for prompt, text in zip(ids, neutral.continuations, strict=True)]
