"""Trying strengths side by side: every prompt at every strength, in one left-padded batch with one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.models.loading import FoundModel, LoadedModel, memory_reported
from probes.models.residual import text_part
from probes.models.seeds import child_seed
from probes.models.tokens import rendered
from probes.steered import steered
from vectors import fit
from vectors.errors import SteerError, UsageError, kept, raise_together
from vectors.expression import Composition
from vectors.steering import SteeringVector


def check(
    ready: FoundModel,
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
    with kept(errors):
        fit.require(
            vectors.items(),
            hidden_size=int(text.hidden_size),
            layers=int(text.num_hidden_layers),
            base=ready.identity,
            any_base=any_base,
        )
    with kept(errors):
        _asked(prompts, ready.tokenizer, ready.config, max_tokens)
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
    the steering. Prompts are asked in the chat template by the rules of extraction (`probes.models.tokens.templated`).
    Raises UsageError for a prompt beyond the context, ExampleError for prompts of which only some are rendered already.
    """
    tokenizer = loaded.tokenizer
    rows = [ids for ids in _asked(prompts, tokenizer, loaded.model.config, max_tokens) for _ in strengths]
    # Padding is masked, so any token will do where a tokenizer has none of its own.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    length = max(map(len, rows))
    compositions = [composition.scaled(strength) for _ in prompts for strength in strengths]
    device = next(loaded.model.parameters()).device
    inputs = {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device),
    }
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        noise = SharedNoise(prompts, len(strengths), temperature, seed)
        sampling["logits_processor"] = [noise]
    with (
        memory_reported(),
        steered(loaded.model, compositions, vectors=vectors, any_base=any_base),
        torch.inference_mode(),
    ):
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            **sampling,
        )
    completions: list[str] = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    width = len(strengths)
    return [[text.strip() for text in completions[i : i + width]] for i in range(0, len(completions), width)]


def _asked(prompts: Sequence[str], tokenizer: Any, config: Any, max_tokens: int) -> list[list[int]]:
    """The ids of each prompt. Raises UsageError for one that leaves no room for an answer, and as `rendered` does."""
    rows = rendered(prompts, tokenizer)
    longest = getattr(text_part(config), "max_position_embeddings", None)
    length = max(map(len, rows))
    if longest is not None and length + max_tokens > longest:
        raise UsageError(
            f"the longest prompt has {length} tokens; {max_tokens} more exceed the model's context of {longest}",
            "shorten the prompt, or lower --max-tokens",
        )
    return rows


class SharedNoise:
    """Sampling by the Gumbel maximum, with the same noise for every strength of a prompt.

    argmax(logits / temperature + noise) is a draw from the softmax (Gumbel 1954), so greedy decoding samples.
    """

    def __init__(self, prompts: Sequence[str], strengths: int, temperature: float, seed: int) -> None:
        self.strengths, self.temperature = strengths, temperature
        self.generators = [torch.Generator().manual_seed(child_seed(seed, "sample", prompt)) for prompt in prompts]

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        noise = gumbel.repeat_interleave(self.strengths, 0).to(scores.device)
        return scores.float() / self.temperature + noise
