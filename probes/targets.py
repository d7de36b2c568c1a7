"""Targets: the distribution that a model should predict at each token of a completion.

A teacher's is stored as its `TOP` most likely tokens and the probability that is left, the tail. A training text is the
special case of one token with probability 1, so one loss serves distillation, fine-tuning and replay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOP = 100  # tokens of each distribution that are stored
LEAST = 1e-12  # the floor of a tail's probability, which keeps its logarithm finite


class Target(NamedTuple):
    """For each token of a completion: `tokens` int64 [length, k] and their log-probabilities, float32 [length, k].

    The probability that is left to 1 is the tail's. Entries of probability 0, with logs of -inf, are padding.
    """

    tokens: Tensor
    logs: Tensor


def soft_target(logits: Tensor, count: int = TOP) -> Target:
    """The `count` most likely tokens of each row of logits [tokens, vocabulary]."""
    logits = logits.float()
    values, index = logits.topk(min(count, logits.shape[-1]), -1)
    return Target(index, values - logits.logsumexp(-1, keepdim=True))


def hard_target(ids: Tensor) -> Target:
    """The tokens `ids` int64 [length] themselves, with probability 1."""
    return Target(ids[:, None], torch.zeros(len(ids), 1))


def divergence_from_target(logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """KL(target || softmax(logits)) in nats, float32 [...], with all tokens of the tail taken as one outcome.

    `logits` is [..., vocabulary], `tokens` and `logs` [..., k]. For one token of probability 1 it is the cross-entropy.
    """
    logits = logits.float()
    predicted = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    probabilities = logs.exp()
    zeros = torch.zeros_like(predicted)
    listed = torch.where(probabilities > 0, probabilities * (logs.clamp_min(-1e4) - predicted), zeros).sum(-1)
    tail = (1 - probabilities.sum(-1)).clamp(0, 1)
    tail = torch.where(tail > 1e-6, tail, torch.zeros_like(tail))  # rounding, not a tail
    # Without padding, which may name a token of the target a second time.
    covered = torch.where(probabilities > 0, predicted.exp(), zeros).sum(-1)
    predicted_tail = (1 - covered).clamp_min(LEAST).log()
    return listed + tail * (tail.clamp_min(LEAST).log() - predicted_tail)
