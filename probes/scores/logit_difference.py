"""The greatest difference of a model's logits from the base's: whether two models are the same up to rounding."""

from __future__ import annotations

from probes.scores import Measured, Needs

SUMMARY = "greatest absolute difference of the model's logits from the base's"
SOURCE = ""
UNIT = "logits"
NEEDS: Needs = "base logits"
combine = max


def score(measured: Measured) -> float:
    """The greatest |difference| over the completion's tokens and the vocabulary."""
    assert measured.logits is not None
    assert measured.base_logits is not None
    return float((measured.logits - measured.base_logits).abs().max())
