"""Forward KL from the teacher's distribution to the student's, on the completion's tokens alone.

Every sample counts the same, however long: its tokens are averaged first, so that gradient accumulation over small
batches gives what one large batch gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.baking.samples import Sample
from steer.baking.targets import divergence

SUMMARY = "match the next-token distribution of the teacher"
SOURCE = "Hinton et al. 2015, arXiv:1503.02531; Bhargava et al. 2024, arXiv:2409.13697"


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Pad on the right. `keep` are the positions whose logits are needed; `counts` says which of them count, by row."""
    longest = max(len(s.ids) for s in samples)
    first, last = min(s.prompt for s in samples) - 1, longest - 1
    most = max(s.target.tokens.shape[1] for s in samples)
    size = (len(samples), last - first)
    batch = {
        "input_ids": torch.full((len(samples), longest), pad),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.long),
        "keep": torch.arange(first, last),
        "counts": torch.zeros(size, dtype=torch.bool),
        "index": torch.zeros(*size, most, dtype=torch.long),
        "logs": torch.full((*size, most), -torch.inf),
    }
    for row, sample in enumerate(samples):
        length, start = len(sample.ids), sample.prompt - 1 - first
        batch["input_ids"][row, :length] = torch.tensor(sample.ids)
        batch["attention_mask"][row, :length] = 1
        place = slice(start, start + length - sample.prompt)
        batch["counts"][row, place] = True
        batch["index"][row, place, : sample.target.tokens.shape[1]] = sample.target.tokens
        batch["logs"][row, place, : sample.target.logs.shape[1]] = sample.target.logs
    return batch


def loss(batch: Mapping[str, Tensor], logits: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The mean over samples of the mean over their tokens, in nats."""
    return by_sample(batch, logits).mean()


def by_sample(batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The mean divergence of each sample, [rows]."""
    counts = batch["counts"]
    rows = torch.zeros(counts.shape, dtype=torch.float32, device=logits.device)
    # Only tokens that count: a batch of unequal lengths has many that don't.
    rows[counts] = divergence(logits[counts], batch["index"][counts], batch["logs"][counts])
    return rows.sum(1) / counts.sum(1)
