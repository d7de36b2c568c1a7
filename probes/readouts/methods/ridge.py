"""Ridge regression onto the labels; the penalty is the one with the least generalised cross-validation error."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.directions.evidence import Evidence, Needs
from probes.readouts.methods import between_the_means

SUMMARY = "ridge regression onto the labels, its penalty by generalised cross-validation"
SOURCE = "Hoerl & Kennard 1970; Golub, Heath & Wahba 1979 (generalised cross-validation), eq. 2.3"
NEEDS: Needs = "activations"
PENALTIES = torch.logspace(-4, 4, 33, dtype=torch.float64)  # relative to the mean eigenvalue


def readout(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """w minimises |X w - y|^2 + penalty |w|^2 over centred rows X; y is 1/n of a positive, -1/m of a negative.

    With these targets w is in the direction of the linear discriminant as the penalty goes to 0.
    """
    assert evidence.activations is not None
    positive, negative = (rows.double() for rows in evidence.activations)
    rows = torch.cat([positive, negative])
    centred = rows - rows.mean(0)
    n = len(rows)
    targets = torch.cat([
        torch.full((len(positive),), n / len(positive)), torch.full((len(negative),), -n / len(negative))
    ]).double()  # fmt: skip
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    squares, along = values.square(), left.T @ targets
    level = squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
    penalties = PENALTIES * level
    kept = squares / (squares + penalties[:, None])  # of each component, by penalty: [penalties, components]
    outside = (targets.square().sum() - along.square().sum()).clamp_min(0.0)  # what no weight explains
    residual = outside + ((1 - kept) * along).square().sum(1)
    freedom = n - 1 - kept.sum(1)  # one for the mean
    penalty = penalties[(residual / freedom.clamp_min(1e-9).square()).argmin()]
    weight = right.T @ (values / (squares + penalty) * along)
    return weight, between_the_means(weight, evidence)
