"""APOLLO's step on processors: two passes over a gradient instead of seven, one thread a matrix, many side by side.

The same numbers as in _apollo.py, up to rounding, for float32 matrices, `signs`, one factor a channel and means in
bfloat16; all else goes the other way. Sums may be taken in the order that suits the processor's vectors: the same on
one machine every time, whatever the threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
TINY = np.finfo(np.float32).tiny
TILE = 512  # columns whose projection, of 64 numbers each, stays in a core's cache


@njit(**OPTIONS)
def _adam(projected, mean, bits, square, numbers, step):  # type: ignore[no-untyped-def]
    """Adam's step of a few projected numbers; `mean` is bfloat16 as uint16, `bits` room for it as uint32.

    `numbers` are 1 - beta1, beta2, 1 - beta2, the corrections of the mean and of the root, and eps.
    """
    fresh, kept2, fresh2, first, second, eps = numbers
    wide = bits.view(np.float32)
    for k in range(projected.size):
        bits[k] = np.uint32(mean[k]) << np.uint32(16)
    for k in range(projected.size):
        value = projected[k]
        wide[k] += fresh * (value - wide[k])
        square[k] = kept2 * square[k] + fresh2 * value * value
        step[k] = first * wide[k] / (second * np.sqrt(square[k]) + eps)
    for k in range(projected.size):
        mean[k] = np.uint16(
            (bits[k] + np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        )


@njit(**OPTIONS)
def _scale(factors, sizes, scalars, last):  # type: ignore[no-untyped-def]
    """From the norms of step and projection [c] to what each channel's gradient is multiplied with, in `factors`.

    `scalars` are the limiter, the step's size and the weights' decay; `last` the last norm, which is updated.
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
    """A step of a matrix [c, d] whose rows are channels; moments [c, r].

    `numbers` and `scalars` are float32: those of `_adam` and of `_scale`.
    """
    channels, length = gradient.shape
    rank = square.shape[1]
    projected, step, bits = np.empty(rank, np.float32), np.empty(rank, np.float32), np.empty(rank, np.uint32)
    factors, sizes = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for j in range(channels):
        projected[:] = 0
        for low in range(0, length, rank):
            own, sign = gradient[j, low : low + rank], signs[low : low + rank]
            for k in range(own.size):
                projected[k] += sign[k] * own[k]
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
    """The same of a matrix [d, c] whose columns are channels; moments [r, c]."""
    length, channels = gradient.shape
    rank = square.shape[0]
    projected, step, bits = np.empty((rank, TILE), np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
    factors, sizes = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for low in range(0, channels, TILE):
        width = min(TILE, channels - low)
        projected[:] = 0
        for i in range(length):
            own, sums, sign = gradient[i, low : low + width], projected[i % rank, :width], signs[i]
            for k in range(own.size):
                sums[k] += sign * own[k]
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
