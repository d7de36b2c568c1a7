"""Next-token logits of existing texts (nothing is generated): of one text, or of many completions in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from probes.interventions import Intervention, no_intervention
from probes.models.completions import Completion

BATCH = 8  # rows of a pass


def logits_of(model: Any, completion: Completion, intervention: Intervention = no_intervention) -> Tensor:
    """The logits after every token of prompt and completion, float32 [tokens, vocabulary] on the CPU."""
    with intervention([completion.prompt_length]), torch.inference_mode():
        ids = torch.tensor([completion.ids], device=_device(model))
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def completion_logits(
    model: Any, completions: Sequence[Completion], intervention: Intervention = no_intervention
) -> Iterator[tuple[int, Tensor]]:
    """The index of each completion, and the logits before each of its tokens, float32 [tokens, vocabulary].

    They come by length, not in the order of `completions`: those of similar length share a pass, since a pass over so
    few rows costs little more than reading the weights once.
    """
    order = sorted(range(len(completions)), key=lambda index: completions[index].length)
    device = _device(model)
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        batch = [completions[index] for index in indices]
        width = max(row.length for row in batch)
        ids = torch.tensor([[*row.ids, *[0] * (width - row.length)] for row in batch], device=device)
        mask = torch.tensor([[1] * row.length + [0] * (width - row.length) for row in batch], device=device)
        lengths = [row.prompt_length for row in batch]
        first = min(lengths) - 1
        keep = torch.arange(first, width - 1, device=device)
        with intervention(lengths), torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        for index, row, each in zip(indices, batch, logits, strict=True):
            # Out of inference mode: what is stored may be needed for a backward pass.
            yield index, each[row.prompt_length - 1 - first : row.length - 1 - first].float().cpu().clone()


def log_likelihoods(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """The log-likelihood of each token of `ids` in nats; row j of `logits` [tokens, vocabulary] predicts `ids[j]`."""
    logs = logits.double().log_softmax(-1)
    return [float(value) for value in logs.gather(1, torch.tensor(ids)[:, None])[:, 0]]


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
