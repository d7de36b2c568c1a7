"""How surprising completions are to a model: the exponential of their mean negative log-likelihood per token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from probes.scores import Needs, likelihood, mean

SUMMARY = "perplexity of the completions, each counting the same however long"
SOURCE = "Jelinek et al. 1977"
UNIT = "perplexity"
NEEDS: Needs = "logits"
score = likelihood.score


def combine(scores: Sequence[float]) -> float:
    """exp(-mean) of the completions' log-likelihoods per token, which are what `score` gives."""
    return math.exp(-mean(scores))
