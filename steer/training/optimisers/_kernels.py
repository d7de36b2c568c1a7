"""APOLLO's step on the CPU: two passes over a gradient instead of seven, one thread per matrix, many in parallel.

The results equal those of _apollo.py up to rounding. Only for float32 matrices with `signs`, one factor per channel and
means in bfloat16; _apollo.py does the rest. Sums are reordered for vector instructions, so results may differ between
machines; on one machine they are the same every time, for any number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
TINY = np.finfo(np.float32).tiny
TILE = 512  # columns per tile: their projections, of 64 numbers each, fit in a core's cache


@njit(**OPTIONS)
def _adam(projected, mean, bits, square, numbers, step):  # type: ignore[no-untyped-def]
    """Adam's step of a few projected numbers; `mean` is bfloat16 as uint16, `bits` a uint32 buffer for it.

    `numbers` are 1 - beta1, beta2, 1 - beta2, the bias corrections of the mean and of the root, and eps.
    """
    fresh, beta2, fresh2, first, second, eps = numbers
    wide = bits.view(np.float32)
    for k in range(projected.size):
        bits[k] = np.uint32(mean[k]) << np.uint32(16)
    for k in range(projected.size):
        value = projected[k]
        wide[k] += fresh * (value - wide[k])
        square[k] = beta2 * square[k] + fresh2 * value * value
        step[k] = first * wide[k] / (second * np.sqrt(square[k]) + eps)
    for k in range(projected.size):
        mean[k] = np.uint16(
            (bits[k] + np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        )


@njit(**OPTIONS)
def _scale(factors, sizes, scalars, last):  # type: ignore[no-untyped-def]
    """Turn the norms of the steps in `factors` [c] into factors of the gradients; `sizes` are the projections' norms.

    `scalars` are the limiter, the step's size and the weights' decay; `last` is the last norm, which is updated.
    """
    limiter, amount, _ = scalars
    total = np.float32(0)
    for j in range(factors.size):
        total += factors[j] * factors[j]
    total = np.sqrt(total)
    if last[0] > 0 and total > limiter * last[0]:
        amount *= limiter * last[0] / total
        total = limiter * last[0]
    if total > 0:
        last[0] = total
    for j in range(factors.size):
        factors[j] *= amount / max(sizes[j], TINY)


@njit(**OPTIONS)
def step_rows(weight, gradient, signs, mean, square, last, numbers, scalars):  # type: ignore[no-untyped-def]
    """Update a matrix [c, d] whose rows are channels; moments are [c, r].

    `numbers` and `scalars` are float32: those of `_adam` and of `_scale`.
    """
    channels, length = gradient.shape
    rank = square.shape[1]
    projected, step, bits = np.empty(rank, np.float32), np.empty(rank, np.float32), np.empty(rank, np.uint32)
    factors, sizes = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for j in range(channels):
        projected[:] = 0
        for low in range(0, length, rank):
            part, sign = gradient[j, low : low + rank], signs[low : low + rank]
            for k in range(part.size):
                projected[k] += sign[k] * part[k]
        _adam(projected, mean[j], bits, square[j], numbers, step)
        size, norm = np.float32(0), np.float32(0)
        for k in range(rank):
            norm += step[k] * step[k]
            size += projected[k] * projected[k]
        factors[j], sizes[j] = np.sqrt(norm), np.sqrt(size)
    _scale(factors, sizes, scalars, last)
    decay = scalars[2]
    for j in range(channels):
        moved, slope, factor = weight[j], gradient[j], factors[j]
        for k in range(moved.size):
            moved[k] = decay * moved[k] - factor * slope[k]


@njit(**OPTIONS)
def step_columns(weight, gradient, signs, mean, square, last, numbers, scalars):  # type: ignore[no-untyped-def]
    """The same for a matrix [d, c] whose columns are channels; moments are [r, c]."""
    length, channels = gradient.shape
    rank = square.shape[0]
    projected, step, bits = np.empty((rank, TILE), np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
    factors, sizes = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for low in range(0, channels, TILE):
        width = min(TILE, channels - low)
        projected[:] = 0
        for i in range(length):
            part, sums, sign = gradient[i, low : low + width], projected[i % rank, :width], signs[i]
            for k in range(part.size):
                sums[k] += sign * part[k]
        norm, size = factors[low : low + width], sizes[low : low + width]
        for r in range(rank):
            sums, moved = projected[r, :width], step[:width]
            before, squares = mean[r, low : low + width], square[r, low : low + width]
            _adam(sums, before, bits[:width], squares, numbers, moved)
            for k in range(width):
                norm[k] += moved[k] * moved[k]
                size[k] += sums[k] * sums[k]
        for k in range(width):
            norm[k], size[k] = np.sqrt(norm[k]), np.sqrt(size[k])
    _scale(factors, sizes, scalars, last)
    decay = scalars[2]
    for i in range(length):
        row, slope = weight[i], gradient[i]
        for k in range(row.size):
            row[k] = decay * row[k] - factors[k] * slope[k]
