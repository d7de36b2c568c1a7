"""The figure of every arm on every item: the plain implementation, one pass of the model for each arm.

What shares work between arms (a common prefix, a batch of differently steered rows) stands behind the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.interventions import Intervention, no_intervention, steering
from probes.logits import completion_logits, log_likelihoods
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, memory_reported
from probes.models.residual import context_length
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.rendering import Rendered, rendered_items
from steer.evaluation.suites.items import Item
from vectors.events import Event, OnEvent, ignore

STAGE = "measuring the items"


def measure_arms(
    loaded: LoadedModel, items: Sequence[Item], arms: Sequence[Arm], *, any_base: bool = False,
    on_event: OnEvent = ignore,
) -> Tensor:  # fmt: skip
    """The figure of every item under every arm, float64 [arms, items], in nats: see `Pair` and `Choice`.

    `loaded` is the model of all these arms, whatever their `model` says. Results do not depend on the order of items or
    arms. Raises ExampleError for items beyond the context, UsageError for a system prompt that the template drops, and
    what `probes.steered.steered` raises.
    """
    limit = context_length(loaded.model.config)
    by_system = {arm.system: rendered_items(items, loaded.tokenizer, limit, arm.system) for arm in arms}
    rows = []
    for position, arm in enumerate(arms):
        on_event(Event(STAGE, position, len(arms), "arms"))
        rendered = by_system[arm.system]
        sums = log_likelihood_sums(
            loaded,
            [completion for each in rendered for completion in each.completions],
            intervention(loaded, arm, any_base),
        )
        rows.append(figures_of(rendered, sums))
    on_event(Event(STAGE, len(arms), len(arms), "arms"))
    return torch.tensor(rows, dtype=torch.float64).reshape(len(arms), len(items))


def figures_of(rendered: Sequence[Rendered], sums: Sequence[float]) -> list[float]:
    """The figure of each item from the log-likelihoods of all their completions, in order."""
    figures, start = [], 0
    for each in rendered:
        figures.append(each.figure(sums[start : start + len(each.completions)]))
        start += len(each.completions)
    return figures


def log_likelihood_sums(
    loaded: LoadedModel, completions: Sequence[Completion], intervene: Intervention = no_intervention
) -> list[float]:
    """The log-likelihood of each completion: the sum over its tokens, in nats."""
    sums = [0.0] * len(completions)
    with memory_reported():
        for index, logits in completion_logits(loaded.model, completions, intervene):
            sums[index] = sum(log_likelihoods(logits, completions[index].completion_ids))
    return sums


def intervention(loaded: LoadedModel, arm: Arm, any_base: bool = False) -> Intervention:
    """What an arm does to the model while it runs."""
    if arm.composition is None:
        return no_intervention
    return steering(loaded.model, arm.composition, arm.vectors, any_base=any_base)
