"""What a sweep measures of a candidate: its cost on neutral text, and the figures of items at several strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.arms.neutral import continuations, summary
from probes.arms.scores import Completions
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.statistics.strata import balanced
from steer.evaluation.measuring.figures import figures_of
from steer.evaluation.measuring.rendering import rendered_items
from steer.evaluation.suites.items import Item, strata_of
from vectors.events import OnEvent, ignore
from vectors.registry.layers import together
from vectors.storage.files import digest_bytes

NEAR, FAR = (-1.0, 1.0), (-2.0, 2.0)  # multiples of a strength: of every point, and of the chosen one
MULTIPLES = (-2.0, -1.0, 1.0, 2.0)  # at which the test items are measured, beside strength 0


class Candidate(NamedTuple):
    """A method's directions, float32 [hidden], and the layers at which they act together."""

    method: str
    layers: tuple[int, ...]
    directions: Mapping[int, Tensor]

    @property
    def name(self) -> str:
        """The candidate in words."""
        return f"{self.method}[{together(self.layers)}]"

    @property
    def digest(self) -> str:
        """The digest of what acts."""
        content = b"".join(self.directions[layer].numpy().tobytes() for layer in self.layers)
        return digest_bytes(content)

    def at(self, strength: float) -> dict[int, Tensor]:
        """What acts at a strength, by layer."""
        return {layer: strength * self.directions[layer] for layer in self.layers}


class Items:
    """Items whose figures are measured; a class because what is shared between compositions lives across calls."""

    def __init__(self, loaded: LoadedModel, items: Sequence[Item]) -> None:
        self.rendered = rendered_items(items, loaded.tokenizer, context_length(loaded.model.config))
        self.completions: list[Completion] = [each for item in self.rendered for each in item.completions]
        self.scored = Completions(loaded.model, self.completions)
        self.strata = strata_of(items)

    def figures(self, compositions: Sequence[Mapping[int, Tensor] | None]) -> list[list[float]]:
        """The figure of every item under each composition, in nats, such that each answer counts equally in a mean."""
        results = []
        for scores in self.scored.scores(compositions):
            sums = [float(each.sum()) for each in scores.log_likelihoods]
            figures = figures_of(self.rendered, sums)
            results.append(balanced(torch.tensor(figures, dtype=torch.float64), self.strata).tolist())
        return results


class NeutralText:
    """What the unsteered model wrote after neutral prompts, on which costs are measured; a class as `Items` is."""

    def __init__(self, loaded: LoadedModel, completions: Sequence[Completion]) -> None:
        self.completions = list(completions)
        self.scored = Completions(loaded.model, self.completions, divergence=True)

    def costs(self, compositions: Sequence[Mapping[int, Tensor] | None]) -> list[dict[str, float]]:
        """Mean, 95th percentile and root mean square of KL(unsteered || steered) per token, in nats."""
        return [
            {"mean": each.mean, "p95": each.p95, "rms": each.rms}
            for each in (summary(torch.cat(scores.divergences)) for scores in self.scored.scores(compositions))
        ]


def neutral_text(
    loaded: LoadedModel, prompts: Sequence[str], *, seed: int = 0, on_event: OnEvent = ignore
) -> NeutralText:
    """What the unsteered model samples after neutral prompts."""
    return NeutralText(loaded, continuations(loaded, prompts, seed=seed, on_event=on_event))


def ids_of(completions: Sequence[Completion]) -> list[Any]:
    """Completions as JSON values, for a digest."""
    return [[list(each.prompt_ids), list(each.completion_ids)] for each in completions]
