"""Logistic regression on standardised activations, mapped back to activation space."""

from __future__ import annotations

from torch import Tensor

from probes.directions.evidence import Evidence, Needs
from probes.directions.methods import logistic

SUMMARY = "regularised logistic regression"
SOURCE = "Alain & Bengio 2016, arXiv:1610.01644; Newton's method: Hastie et al. 2009, section 4.4.1"
NEEDS: Needs = "activations"


def readout(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The plane of the penalised maximum of the likelihood, both classes of equal weight."""
    return logistic.plane(evidence)
