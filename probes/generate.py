"""Trying strengths side by side: every prompt at every strength, in one left-padded batch with one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.model import LoadedModel
from probes.seeds import child_seed
from probes.steered import steered
from vectors.errors import UsageError
from vectors.expression import Composition
from vectors.steering import SteeringVector


def render(prompt: str, tokenizer: Any) -> str:
    """A prompt as the model expects it: a user's turn where there is a chat template, else the text itself."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


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
    the steering. Raises UsageError for a prompt beyond the context.
    """
    tokenizer = loaded.tokenizer
    chat = bool(getattr(tokenizer, "chat_template", None))
    texts = [render(prompt, tokenizer) for prompt in prompts]
    rows = [text for text in texts for _ in strengths]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(rows, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    length = batch["input_ids"].shape[1]
    if longest is not None and length + max_tokens > longest:
        raise UsageError(
            f"the longest prompt has {length} tokens; {max_tokens} more exceed the model's context of {longest}",
            "shorten the prompt, or lower --max-tokens",
        )
    compositions = [composition.scaled(strength) for _ in prompts for strength in strengths]
    device = next(loaded.model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        noise = _SharedNoise(prompts, len(strengths), temperature, seed)
        sampling["logits_processor"] = [noise]
    with steered(loaded.model, compositions, vectors=vectors, any_base=any_base), torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            **sampling,
        )
    completions: list[str] = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    width = len(strengths)
    return [[text.strip() for text in completions[i : i + width]] for i in range(0, len(completions), width)]


class _SharedNoise:
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
