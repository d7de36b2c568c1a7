"""Batched, seeded generation of completions.

Greedy, or sampled by the Gumbel maximum: argmax(logits / temperature + noise) is a draw from the softmax (Gumbel 1954).
The noise of a row follows from the seed and the row's name, so neither the order of the prompts nor the batch that they
share changes a completion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probes.interventions import Intervention, no_intervention
from probes.models.completions import Completion
from probes.models.loading import memory_reported
from probes.models.packed_linear import packed_linear
from probes.seeds import child_seed
from vectors.events import Event, OnEvent, ignore

BATCH = 64  # rows of a batch
FEW = 3  # rows for which reordering the weights takes longer than it saves


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    intervention: Intervention = no_intervention,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    names: Sequence[str] = (),
    stage: str = "generating",
    on_event: OnEvent = ignore,
) -> list[Completion]:
    """One completion of each prompt (ids), of at most `max_tokens` tokens, its end token included.

    Temperature 0 is greedy. Above 0, `names` (one for each prompt; by default its index) determine the random numbers:
    rows with the same name draw the same ones. `stage` is the stage of the events. Raises ModelError when memory runs
    out.
    """
    names = names or [str(index) for index in range(len(prompts))]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, Completion] = {}
    on_event(Event(stage, 0, len(prompts), "completions"))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        batch_completions = generate_batch(
            model,
            tokenizer,
            [prompts[index] for index in batch],
            intervention,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            names=[names[index] for index in batch],
        )
        completions.update(zip(batch, batch_completions, strict=True))
        on_event(Event(stage, len(completions), len(prompts), "completions"))
    return [completions[index] for index in range(len(prompts))]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    intervention: Intervention = no_intervention,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    names: Sequence[str],
) -> list[Completion]:
    """`generate` for prompts that share one batch, padded on the left, whose rows are in the order of `prompts`."""
    if max_tokens == 0:
        return [Completion(list(prompt), []) for prompt in prompts]
    # Padding is masked, so any token will do where a tokenizer has none of its own.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = end_tokens(model, tokenizer)
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    device = next(model.parameters()).device
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - length) + [1] * length for length in lengths]
    sampling: dict[str, Any] = {}
    if temperature > 0:
        sampling["logits_processor"] = [NamedNoise(names, temperature, seed)]
    packed = packed_linear(model) if len(prompts) > FEW else contextlib.nullcontext()
    with memory_reported(), packed, intervention(lengths), torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **sampling,
        )
    completions = []
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        stop = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        completions.append(Completion(list(prompt), row[:stop]))
    return completions


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    intervention: Intervention = no_intervention,
    *,
    max_tokens: int,
) -> list[str]:
    """The greedy completion of each prompt (ids) as text."""
    completions = generate(model, tokenizer, prompts, intervention, max_tokens=max_tokens)
    texts = tokenizer.batch_decode([list(each.completion_ids) for each in completions], skip_special_tokens=True)
    return [text.strip() for text in texts]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids at which a completion ends: those of the model's generation settings, and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


class NamedNoise:
    """A logits processor that makes greedy decoding sample: Gumbel noise from the seed and each row's name."""

    def __init__(self, names: Sequence[str], temperature: float, seed: int) -> None:
        self.temperature = temperature
        different = list(dict.fromkeys(names))
        self.generators = [torch.Generator().manual_seed(child_seed(seed, "sample", name)) for name in different]
        self.rows = torch.tensor([different.index(name) for name in names])

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [rows, vocabulary] divided by the temperature, plus Gumbel noise, float32."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + gumbel[self.rows].to(scores.device)
