"""Means on a sphere, computed from the inner products of the inputs alone.

A point is a linear combination of the unit vectors u_i = x_i / |x_i|. Lengths and angles of combinations follow from
their coefficients and C = [<u_i, u_j>], so a tensor is read twice, whatever the number of iterations.
"""

from __future__ import annotations

import math

import numpy as np

COLINEAR = 0.9995  # cosine above which most tools interpolate linearly
PARALLEL = 1 - 1e-12  # cosine above which the angle is not representable in float64


def slerp(gram: np.ndarray, t: float, chord: float) -> np.ndarray:
    """The coefficients of two vectors: sin((1-t)a)/sin(a) and sin(ta)/sin(a) (Shoemake 1985).

    Above the cosine `chord` interpolation is linear: 1-t and t. `gram` [2, 2] are the inner products.
    """
    norms = np.sqrt(np.diag(gram))
    cosine = float(gram[0, 1] / (norms[0] * norms[1])) if norms.all() else 1.0
    if abs(cosine) > chord:
        return np.array([1 - t, t])
    angle = math.acos(cosine)
    return np.array([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def mean(gram: np.ndarray, weights: np.ndarray, *, steps: int = 100, tolerance: float = 1e-12) -> np.ndarray:
    """The coefficients of the weighted Fr\u00e9chet (Karcher) mean of the directions, times the weighted mean length.

    The mean is the point at which the weighted sum of the logarithm maps is zero, found by fixed-point iteration;
    weights are normalised. `gram` [inputs, inputs] are the inner products. Zero vectors count only for the length.
    """
    share = weights / weights.sum()
    norms = np.sqrt(np.diag(gram))
    length = float(share @ norms)
    alive = norms > 0
    if not alive.any():
        return np.zeros(len(norms))
    inverse = np.where(alive, 1 / np.where(alive, norms, 1), 0)
    cosines = gram * np.outer(inverse, inverse)
    share = np.where(alive, share, 0)
    share = share / share.sum() if share.sum() else alive / alive.sum()
    point = share.copy()
    size = point @ cosines @ point
    if size <= 1e-24:  # opposite directions: any point between them is a mean, so begin at the first
        point = np.eye(len(norms))[int(np.argmax(share))]
        size = 1.0
    point = point / math.sqrt(size)
    for _ in range(steps):
        along = np.clip(cosines @ point, -1, 1)
        angles = np.arccos(along)
        sines = np.sin(angles)
        ratio = np.where(sines > 1e-12, angles / np.where(sines > 1e-12, sines, 1), 1.0)
        tangent = share * ratio - float((share * ratio) @ along) * point
        step = math.sqrt(max(float(tangent @ cosines @ tangent), 0.0))
        if step < tolerance:
            break
        point = math.cos(step) * point + math.sin(step) * tangent / step
        point = point / math.sqrt(float(point @ cosines @ point))
    return length * point * inverse
