"""Forward KL from the teacher's distribution to the student's, on the completion's tokens alone.

Every sample has the same weight, whatever its length: the loss is averaged over its tokens first. So gradient
accumulation over small batches gives the same gradient as one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from probes.targets import divergence_from_target
from steer.training.data.samples import Sample
from steer.training.objectives.protocol import ObjectiveSettings

SUMMARY = "match the next-token distribution of the teacher"
SOURCE = "Hinton et al. 2015, arXiv:1503.02531; Bhargava et al. 2024, arXiv:2409.13697"


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """A batch, padded on the right.

    `input_ids` and `attention_mask` [rows, longest] are the sequences, `prompts` [rows] the lengths of their prompts.
    `keep` [kept] are the positions for which logits are computed; `counts` [rows, kept] marks those that come before a
    completion token. For each such token, row after row: its `row` [count], and the target's `tokens` and `logs`
    (log-probabilities), [count, k].
    """
    completions = [sample.completion for sample in samples]
    longest = max(c.length for c in completions)
    first = min(c.prompt_length for c in completions) - 1
    most = max(s.target.tokens.shape[1] for s in samples)
    batch = {
        "input_ids": torch.full((len(samples), longest), pad),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.long),
        "prompts": torch.tensor([c.prompt_length for c in completions]),
        "keep": torch.arange(first, longest - 1),
        "counts": torch.zeros(len(samples), longest - 1 - first, dtype=torch.bool),
        "row": torch.cat([torch.full((len(c.completion_ids),), row) for row, c in enumerate(completions)]),
        "tokens": torch.cat([_wide(s.target.tokens, most, 0) for s in samples]),
        "logs": torch.cat([_wide(s.target.logs, most, -torch.inf) for s in samples]),
    }
    for row, completion in enumerate(completions):
        batch["input_ids"][row, : completion.length] = torch.tensor(completion.ids)
        batch["attention_mask"][row, : completion.length] = 1
        batch["counts"][row, completion.prompt_length - 1 - first : completion.length - 1 - first] = True
    return batch


def _wide(values: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)


def loss(batch: Mapping[str, Tensor], logits: Tensor, settings: ObjectiveSettings) -> Tensor:
    """The mean over samples of the mean over their tokens, in nats. `logits` is [count, vocabulary]."""
    return by_sample(batch, logits).mean()


def by_sample(batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The mean divergence of each sample, [rows]."""
    return summed(batch, logits) / batch["counts"].sum(1)


def summed(batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The divergence of each sample, summed over its tokens, [rows]."""
    by_token = divergence_from_target(logits, batch["tokens"], batch["logs"])
    return torch.zeros(len(batch["counts"]), device=by_token.device).index_add(0, batch["row"], by_token)
