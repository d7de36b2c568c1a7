"""The first principal component of the paired differences, not centred.

Centring would subtract the mean difference, which is the direction that is wanted. Without pairs the second moment is
that of every positive with every negative, which the classes' own moments give in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probes.directions.evidence import Evidence, Needs

SUMMARY = "first component of the uncentred paired differences"
SOURCE = "Zou et al. 2023 (representation engineering), arXiv:2310.01405, with the centring left out"
NEEDS: Needs = "pair moments"
ROUNDS = 300


def direction(evidence: Evidence) -> Tensor:
    """The leading eigenvector of E[(x - y)(x - y)^T] over pairs (x, y), float64 [hidden], of either sign."""
    pairs = evidence.differences
    if pairs is not None:
        assert pairs.scatter is not None
        moment = pairs.scatter / pairs.count + torch.outer(pairs.mean, pairs.mean)
    else:
        positive, negative = evidence.positive, evidence.negative
        assert positive.scatter is not None
        assert negative.scatter is not None
        spread = positive.scatter / positive.count + negative.scatter / negative.count
        moment = spread + torch.outer(evidence.displacement, evidence.displacement)
    return leading_eigenvector(moment, evidence.displacement)


def leading_eigenvector(moment: Tensor, start: Tensor) -> Tensor:
    """By power iteration from `start`; by a full decomposition where that does not settle (a small eigengap)."""
    vector = start / start.norm().clamp_min(torch.finfo(start.dtype).tiny)
    for _ in range(ROUNDS):
        product = moment @ vector
        length = product.norm()
        if not length > 0:
            break
        product = product / length
        if float((product - vector).norm()) < 1e-10:
            return product
        vector = product
    return torch.linalg.eigh(moment).eigenvectors[:, -1]
