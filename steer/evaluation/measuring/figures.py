"""The figure of every arm on every item: tokens and blocks that arms share are computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.arms.scores import Completions, TokenScores
from probes.interventions import Intervention, no_intervention, steering
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.rendering import Rendered, rendered_items
from steer.evaluation.suites.items import Item
from vectors.events import Event, OnEvent, ignore

STAGE = "measuring the items"
TOGETHER = 8  # arms of one call, between which progress is reported


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
    figures = torch.zeros(len(arms), len(items), dtype=torch.float64)
    done = 0
    for system in dict.fromkeys(arm.system for arm in arms):
        rendered = rendered_items(items, loaded.tokenizer, limit, system)
        shared = Completions(loaded.model, [completion for each in rendered for completion in each.completions])
        indices = [index for index, arm in enumerate(arms) if arm.system == system]
        for start in range(0, len(indices), TOGETHER):
            on_event(Event(STAGE, done, len(arms), "arms"))
            part = indices[start : start + TOGETHER]
            for index, scores in zip(part, scores_of(shared, [arms[i] for i in part], any_base), strict=True):
                sums = [float(values.sum()) for values in scores.log_likelihoods]
                figures[index] = torch.tensor(figures_of(rendered, sums), dtype=torch.float64)
            done += len(part)
    on_event(Event(STAGE, len(arms), len(arms), "arms"))
    return figures


def scores_of(shared: Completions, arms: Sequence[Arm], any_base: bool = False) -> list[TokenScores]:
    """The scores of completions under the compositions of several arms, each with its own vectors."""
    return shared.scores(
        [arm.composition for arm in arms], [arm.vectors for arm in arms], probes=[arm.probes for arm in arms],
        any_base=any_base,
    )  # fmt: skip


def figures_of(rendered: Sequence[Rendered], sums: Sequence[float]) -> list[float]:
    """The figure of each item from the log-likelihoods of all their completions, in order."""
    figures, start = [], 0
    for each in rendered:
        figures.append(each.figure(sums[start : start + len(each.completions)]))
        start += len(each.completions)
    return figures


def intervention(loaded: LoadedModel, arm: Arm, any_base: bool = False) -> Intervention:
    """What an arm does to the model while it runs."""
    if arm.composition is None:
        return no_intervention
    return steering(loaded.model, arm.composition, arm.vectors, probes=arm.probes, any_base=any_base)
