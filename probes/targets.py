"""What a model is to predict at each token: its most likely tokens and a tail, or one certain token.

A training text is the special case of one certain token, so one measure serves distillation, fine-tuning and replay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOP = 100  # tokens of each distribution that are stored
LEAST = 1e-12  # of a tail's probability: keeps its logarithm finite


class Target(NamedTuple):
    """For each token of a completion: `tokens` [length, k] int64 and their log-probabilities `logs`, float32.

    What is left to 1 is the tail. Entries of probability 0 have logs of -inf.
    """

    tokens: Tensor
    logs: Tensor


def soft_target(logits: Tensor, count: int = TOP) -> Target:
    """The `count` most likely tokens of each row of logits [tokens, vocabulary]."""
    logits = logits.float()
    values, index = logits.topk(min(count, logits.shape[-1]), -1)
    return Target(index, values - logits.logsumexp(-1, keepdim=True))


def hard_target(ids: Tensor) -> Target:
    """The tokens [tokens] themselves, with probability 1."""
    return Target(ids[:, None], torch.zeros(len(ids), 1))


def divergence_from_target(logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """KL(target || softmax(logits)) in nats, the target's tail taken as one outcome, [...].

    `logits` is [..., vocabulary], `tokens` and `logs` [..., k]. For a certain token it is the cross-entropy.
    """
    logits = logits.float()
    predicted = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    given = logs.exp()
    listed = torch.where(given > 0, given * (logs.clamp_min(-1e4) - predicted), torch.zeros_like(predicted)).sum(-1)
    rest = (1 - given.sum(-1)).clamp(0, 1)
    rest = torch.where(rest > 1e-6, rest, torch.zeros_like(rest))  # rounding, not a tail
    # Only tokens of the target count: padding would take the same token twice.
    covered = torch.where(given > 0, predicted.exp(), torch.zeros_like(predicted)).sum(-1)
    missed = (1 - covered).clamp_min(LEAST).log()
    return listed + rest * (rest.clamp_min(LEAST).log() - missed)
