"""How likely a completion is to a model: its log-likelihood per token.

The margin of a trait is that of examples which show it, less that of examples which show its opposite.
"""

from __future__ import annotations

from probes.logits import log_likelihoods
from probes.scores import Measured, Needs, mean

SUMMARY = "log-likelihood per token of the completion"
SOURCE = ""
UNIT = "nats per token"
NEEDS: Needs = "logits"
combine = mean


def score(measured: Measured) -> float:
    """The mean log-likelihood of the completion's tokens."""
    assert measured.logits is not None
    return mean(log_likelihoods(measured.logits, measured.completion.completion_ids))
