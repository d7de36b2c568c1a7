"""Difference of means: the mean displacement itself."""

from __future__ import annotations

from torch import Tensor

from probes.directions.evidence import Evidence, Needs

SUMMARY = "difference of the two classes' means"
SOURCE = "Marks & Tegmark 2023, arXiv:2310.06824; Rimsky et al., ACL 2024 (CAA), arXiv:2312.06681"
NEEDS: Needs = "means"


def direction(evidence: Evidence) -> Tensor:
    """mean(positive) - mean(negative), float64 [hidden]."""
    return evidence.displacement
