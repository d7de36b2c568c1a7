"""How far a model is from what it should predict: KL(target || model), the cross-entropy where the target is a text."""

from __future__ import annotations

from probes.scores import Measured, Needs, mean
from probes.targets import divergence_from_target

SUMMARY = "KL divergence of the model's next-token distribution from a teacher's, or the cross-entropy of a text"
SOURCE = "Hinton et al. 2015, arXiv:1503.02531"
UNIT = "nats per token"
NEEDS: Needs = "target"
combine = mean


def score(measured: Measured) -> float:
    """The mean of KL(target || model) over the completion's tokens."""
    assert measured.logits is not None
    assert measured.target is not None
    return float(divergence_from_target(measured.logits, *measured.target).mean())
