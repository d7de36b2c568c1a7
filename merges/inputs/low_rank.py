"""The best low-rank approximation of a delta, as two factors."""

from __future__ import annotations

import numpy as np

SMALL = 1024  # the shorter side up to which a matrix is decomposed exactly


def factors(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best rank-`rank` approximation of a matrix: up [rows, rank], down [rank, columns], and its relative error.

    Both are float32 and share the singular values: each holds their square roots. The error is in the Frobenius norm.

    By the singular value decomposition (Eckart and Young 1936); for large matrices by subspace iteration with a fixed
    random start (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), within a percent of the best error.
    """
    wide = np.asarray(delta, np.float64)
    rank = min(rank, *wide.shape)
    if min(wide.shape) <= SMALL or rank * 3 > min(wide.shape):
        left, values, right = np.linalg.svd(wide, full_matrices=False)
    else:
        start = np.random.default_rng(0).standard_normal((wide.shape[1], rank + 16))
        basis = np.linalg.qr(wide @ start)[0]
        for _ in range(4):
            basis = np.linalg.qr(wide @ np.linalg.qr(wide.T @ basis)[0])[0]
        small, values, right = np.linalg.svd(basis.T @ wide, full_matrices=False)
        left = basis @ small
    root = np.sqrt(values[:rank])
    up, down = (left[:, :rank] * root).astype(np.float32), (root[:, None] * right[:rank]).astype(np.float32)
    norm = float(np.linalg.norm(wide))
    return up, down, float(np.linalg.norm(wide - up.astype(float) @ down)) / norm if norm else 0.0
