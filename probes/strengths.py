"""Trying strengths side by side: every prompt at every strength, in one batch and with the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from probes.generation import generate_batch
from probes.models.loading import LoadedModel, OpenedModel
from probes.models.residual import context_length, text_part
from probes.models.tokens import rendered
from probes.steered import steered
from vectors import fit
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.expression import Composition
from vectors.steering import SteeringVector


def require_fitting(
    ready: OpenedModel,
    vectors: Mapping[str, SteeringVector],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    any_base: bool = False,
) -> None:
    """Refuse, before a model's weights are loaded, vectors that do not fit it and prompts beyond its context.

    Raises one error with all problems: ArtifactError, UsageError or ExampleError.
    """
    text = text_part(ready.config)
    errors: list[SteerError] = []
    with collecting(errors):
        fit.require_fit(
            vectors.items(),
            hidden_size=int(text.hidden_size),
            layers=int(text.num_hidden_layers),
            base=ready.identity,
            any_base=any_base,
        )
    with collecting(errors):
        _prompt_ids(prompts, ready.tokenizer, ready.config, max_tokens)
    raise_together(errors)


def try_strengths(
    loaded: LoadedModel,
    composition: Composition,
    vectors: Mapping[str, str | Path | SteeringVector],
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    any_base: bool = False,
) -> list[list[str]]:
    """The completion of each prompt (rows) at each strength (columns), all in one batch.

    With `temperature` above 0 every strength of a prompt draws from the same random numbers, so that what differs is
    the steering. Prompts are put into the chat template by the rules of extraction (`probes.models.tokens.templated`).
    Raises UsageError for a prompt beyond the context, ExampleError for prompts of which only some are rendered already.
    """
    ids = _prompt_ids(prompts, loaded.tokenizer, loaded.model.config, max_tokens)
    compositions = [composition.scaled(strength) for _ in prompts for strength in strengths]

    def a_strength_for_each_row(_prompt_lengths: Sequence[int]) -> AbstractContextManager[None]:
        return steered(loaded.model, compositions, vectors=vectors, any_base=any_base)

    completions = generate_batch(
        loaded.model,
        loaded.tokenizer,
        [prompt for prompt in ids for _ in strengths],
        a_strength_for_each_row,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        names=[prompt for prompt in prompts for _ in strengths],
    )
    texts = loaded.tokenizer.batch_decode([c.completion_ids for c in completions], skip_special_tokens=True)
    width = len(strengths)
    return [[text.strip() for text in texts[i : i + width]] for i in range(0, len(texts), width)]


def _prompt_ids(prompts: Sequence[str], tokenizer: Any, config: Any, max_tokens: int) -> list[list[int]]:
    """The ids of each prompt. Raises UsageError for one that leaves no room for an answer, and as `rendered` does."""
    ids = rendered(prompts, tokenizer)
    limit = context_length(config)
    longest = max(map(len, ids))
    if limit is not None and longest + max_tokens > limit:
        raise UsageError(
            f"the longest prompt has {longest} tokens; {max_tokens} more exceed the model's context of {limit}",
            "shorten the prompt, or lower --max-tokens",
        )
    return ids
