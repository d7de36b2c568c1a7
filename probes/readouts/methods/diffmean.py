"""Difference of means: the mean displacement as the weight, the boundary halfway between the means."""

from __future__ import annotations

from torch import Tensor

from probes.directions.evidence import Evidence, Needs
from probes.readouts.methods import between_the_means

SUMMARY = "difference of the two classes' means"
SOURCE = "Marks & Tegmark 2023, arXiv:2310.06824; as a detector: Wu et al. 2025 (AxBench), arXiv:2501.17148"
NEEDS: Needs = "means"


def readout(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """w = mean(positive) - mean(negative)."""
    weight = evidence.displacement
    return weight, between_the_means(weight, evidence)
