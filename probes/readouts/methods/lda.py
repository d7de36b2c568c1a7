"""Linear discriminant analysis: the means through the shrunk pooled covariance.

If both classes are normal with this covariance and equally frequent, w h + b are the log-odds themselves.
"""

from __future__ import annotations

from torch import Tensor

from probes.directions.evidence import Evidence, Needs
from probes.directions.methods import whitened
from probes.readouts.methods import between_the_means

SUMMARY = "linear discriminant: means through the shrunk pooled covariance"
SOURCE = "Fisher 1936; Hastie et al. 2009, eq. 4.11; shrinkage: Chen et al. 2010 (OAS), arXiv:0907.4698"
NEEDS: Needs = "second moments"


def readout(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """w = S^-1 (mean(positive) - mean(negative)), with S the shrunk pooled covariance."""
    weight = whitened.direction(evidence)
    return weight, between_the_means(weight, evidence)
