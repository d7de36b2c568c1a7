"""How far a model's predictions lie from the base's: KL(base || model)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.scores import Measured, Needs, mean

SUMMARY = "KL divergence of the model's next-token distribution from the base's"
SOURCE = "Kullback & Leibler 1951"
UNIT = "nats per token"
NEEDS: Needs = "base logits"
combine = mean


def score(measured: Measured) -> float:
    """The mean of KL(base || model) over the completion's tokens."""
    assert measured.logits is not None
    assert measured.base_logits is not None
    return float(divergence(measured.base_logits, measured.logits).mean())


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of each token in nats, [tokens] float64, from logits [tokens, vocabulary]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


class Difference(NamedTuple):
    """Over all tokens: the greatest |difference of logits|, the mean and the greatest KL divergence in nats."""

    max_logit: float
    kl_mean: float
    kl_max: float
    tokens: int


def difference(references: Sequence[Tensor], others: Sequence[Tensor]) -> Difference:
    """How far two models' logits [tokens, vocabulary] lie apart, text by text."""
    kl = torch.cat([divergence(a, b) for a, b in zip(references, others, strict=True)])
    greatest = torch.stack([(a - b).abs().max() for a, b in zip(references, others, strict=True)]).max()
    return Difference(float(greatest), float(kl.mean()), float(kl.max()), len(kl))
