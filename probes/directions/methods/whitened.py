"""Difference of means through the shrunk pooled covariance: Fisher's linear discriminant."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.directions.evidence import Evidence, Needs

SUMMARY = "difference of means through the shrunk pooled covariance (LDA)"
SOURCE = "Fisher 1936; shrinkage: Chen, Wiesel, Eldar & Hero 2010 (OAS), arXiv:0907.4698, eq. 23"
NEEDS: Needs = "second moments"


def direction(evidence: Evidence) -> Tensor:
    """S^-1 (mean(positive) - mean(negative)) with S the shrunk pooled covariance, float64 [hidden]."""
    positive, negative = evidence.positive, evidence.negative
    assert positive.scatter is not None
    assert negative.scatter is not None
    count = positive.count + negative.count
    covariance = (positive.scatter + negative.scatter) / count
    if not bool(covariance.any()):  # one example of each class: no spread to whiten by
        return evidence.displacement
    return torch.cholesky_solve(evidence.displacement[:, None], torch.linalg.cholesky(shrunk(covariance, count)))[:, 0]


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """The oracle-approximating shrinkage of a covariance [p, p] of `count` samples towards a scaled identity."""
    p = len(covariance)
    trace, square = covariance.trace(), (covariance * covariance).sum()
    between = square - trace**2 / p  # zero for a multiple of the identity, which needs no shrinking
    numerator = (1 - 2 / p) * square + trace**2
    shrinkage = (numerator / ((count + 1 - 2 / p) * between)).clamp(max=1.0) if between > 0 else torch.ones(())
    identity = torch.eye(p, dtype=covariance.dtype)
    # The floor keeps the matrix invertible when every example of a class is the same.
    level = (trace / p).clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    return (1 - shrinkage) * covariance + (shrinkage * level + 1e-9 * level) * identity
