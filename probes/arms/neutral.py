"""What steering costs elsewhere: KL(unsteered || steered) of every token of neutral text that the model wrote itself.

The definition is one for all commands: prompts are put into the chat template, the unsteered model continues each by
`TOKENS` tokens sampled at temperature 1, and every token of the continuations counts once. A budget is a bound on the
95th percentile over these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from probes.generation import generate
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.tokens import rendered
from vectors.events import OnEvent, ignore

TOKENS = 32
PERCENTILE = 0.95


class Divergence(NamedTuple):
    """KL(unsteered || steered) per token on neutral text, in nats: mean, 95th percentile and root mean square."""

    mean: float
    p95: float
    rms: float
    tokens: int


def continuations(
    loaded: LoadedModel, prompts: Sequence[str], *, tokens: int = TOKENS, seed: int = 0, on_event: OnEvent = ignore
) -> list[Completion]:
    """What the unsteered model samples after each neutral prompt; empty where it ends at once."""
    ids = rendered(prompts, loaded.tokenizer)
    return generate(
        loaded.model, loaded.tokenizer, ids, max_tokens=tokens, temperature=1.0, seed=seed, names=list(prompts),
        stage="continuing the neutral prompts", on_event=on_event,
    )  # fmt: skip


def summary(values: Tensor) -> Divergence:
    """The figures of divergences [tokens]."""
    return Divergence(
        float(values.mean()), float(values.quantile(PERCENTILE)), float(values.square().mean().sqrt()), len(values)
    )
