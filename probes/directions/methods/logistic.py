"""Logistic regression on standardised activations, its normal mapped back to activation space.

A coefficient w on (x - mean) / deviation is w / deviation on x. Leaving that division out is the commonest mistake of
probes that are used for steering: the direction is then in the wrong space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probes.directions.evidence import Evidence, Needs

SUMMARY = "normal of a regularised logistic regression, in activation space"
SOURCE = "Alain & Bengio 2016, arXiv:1610.01644; Newton's method: Hastie et al. 2009, section 4.4.1"
NEEDS: Needs = "activations"
PENALTY = 1.0  # of |w|^2 / 2, against the mean log-likelihood: separable classes have no finite fit without one
ROUNDS = 50


def direction(evidence: Evidence) -> Tensor:
    """The normal of the separating plane, float64 [hidden]."""
    return plane(evidence)[0]


def plane(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The separating plane: its normal w, float64 [hidden], and its intercept b; w h + b are the log-odds at h."""
    assert evidence.activations is not None
    positive, negative = (rows.double() for rows in evidence.activations)
    rows = torch.cat([positive, negative])
    # The deviation within the classes: that of all rows would shrink the very coordinates that tell them apart.
    within = [group - group.mean(0) for group in (positive, negative)]
    deviation = torch.cat(within).square().mean(0).sqrt()
    if not bool(deviation.any()):  # one example of each class: nothing to standardise by
        deviation = torch.ones_like(deviation)
    # A constant coordinate tells nothing; dividing by its rounding error would make it tell everything.
    deviation = torch.where(deviation > 1e-12 * deviation.max(), deviation, torch.inf)
    middle = rows.mean(0)
    standardised = (rows - middle) / deviation
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    # Equal weight to the classes: unequal sizes shift the plane, and the penalty would tilt it.
    balance = torch.where(labels > 0, len(rows) / (2 * len(positive)), len(rows) / (2 * len(negative)))
    coefficients, intercept = fit(standardised, labels, balance, PENALTY * len(rows))
    normal = coefficients / deviation
    return normal, intercept - normal @ middle


def fit(rows: Tensor, labels: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge-penalised logistic regression with a free intercept, by Newton's method: w [features], and b.

    Minimises sum_i weights_i log(1 + exp(-s_i (w x_i + b))) + penalty |w|^2 / 2. With fewer rows than features the
    problem is solved in the space of the rows, where the minimiser lies.
    """
    basis = None
    if rows.shape[0] < rows.shape[1]:
        basis, triangle = torch.linalg.qr(rows.T)  # rows = triangle.T @ basis.T
        rows = triangle.T
    n, p = rows.shape
    design = torch.cat([rows, torch.ones(n, 1, dtype=rows.dtype)], 1)
    ridge = torch.full((p + 1,), penalty, dtype=rows.dtype)
    ridge[-1] = 0.0
    solution = torch.zeros(p + 1, dtype=rows.dtype)
    value = _objective(design, labels, weights, ridge, solution)
    for _ in range(ROUNDS):
        probability = torch.sigmoid(design @ solution)
        gradient = design.T @ (weights * (probability - labels)) + ridge * solution
        curvature = weights * probability * (1 - probability)
        hessian = (design.T * curvature) @ design + torch.diag(ridge + 1e-10)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-8:  # halve until it descends: a full step can overshoot far from the minimum
            candidate = solution - size * step
            new = _objective(design, labels, weights, ridge, candidate)
            if new <= value:
                break
            size /= 2
        else:
            break
        solution, settled, value = candidate, float(value - new) < 1e-12 * (1 + float(value)), new
        if settled:
            break
    return solution[:-1] if basis is None else basis @ solution[:-1], solution[-1]


def _objective(design: Tensor, labels: Tensor, weights: Tensor, ridge: Tensor, solution: Tensor) -> Tensor:
    scores = design @ solution
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, weight=weights, reduction="sum")
    return loss + (ridge * solution * solution).sum() / 2
