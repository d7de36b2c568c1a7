"""Simulated experiments, for the self-test: how often the statistics err, and how soon they find an effect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from steer.experiments.statistics.bounds import wilson
from steer.experiments.statistics.sample_ratio import THRESHOLD, chi_square_tail
from steer.experiments.statistics.sequences import ALPHA, FEWEST, THIN, TUNED_AT, half_width


class Rates(NamedTuple):
    """Of `experiments` experiments: the share ever significant with its interval, and of those the median units."""

    experiments: int
    significant: float
    low: float
    high: float
    median_units: float
    mismatched: float  # the share whose sample-ratio check failed at the end
    covered: float  # the share whose interval held the true difference at every look


def simulate(
    weights: Mapping[str, float],
    *,
    effect: float,
    spread: float,
    rate: float | None = None,
    units: int,
    looks: int = 40,
    experiments: int = 2_000,
    alpha: float = ALPHA,
    tuned_at: float = TUNED_AT,
    seed: int = 0,
) -> Rates:
    """Experiments of two arms with `units` units in all, looked at `looks` times in equal steps.

    A unit is in the first arm by its weight. Values are normal with standard deviation `spread`, or, with a `rate`,
    yes or no with that rate in the first arm and `rate + effect` in the second. All experiments run at once, look by
    look, on running sums: [experiments] float64 each.
    """
    generator = np.random.default_rng(seed)
    first, second = (float(weight) for weight in weights.values())
    share = second / (first + second)
    counts = np.zeros((2, experiments))
    sums, squares = np.zeros((2, experiments)), np.zeros((2, experiments))
    found = np.full(experiments, math.inf)
    covered = np.ones(experiments, dtype=bool)
    ends = np.linspace(0, units, looks + 1).round().astype(int)
    for start, end in itertools.pairwise(ends):
        arriving = end - start
        in_second = generator.binomial(arriving, share, experiments)
        for arm, n in enumerate((arriving - in_second, in_second)):
            total, of_squares = drawn(generator, n, effect if arm else 0.0, spread, rate)
            counts[arm] += n
            sums[arm] += total
            squares[arm] += of_squares
        estimate, error = _difference(counts, sums, squares)
        ready = (counts.min(0) >= FEWEST) & (error > 0)
        if not ready.any():
            continue
        half = half_width(1.0, int(end), alpha, tuned_at) * error
        found = np.where(ready & (np.abs(estimate) > half) & np.isinf(found), end, found)
        covered &= ~ready | (np.abs(estimate - effect) <= half)
    significant = np.isfinite(found)
    low, high = wilson(int(significant.sum()), experiments)
    expected = np.array([1 - share, share])[:, None] * counts.sum(0)
    statistic = ((counts - expected) ** 2 / expected).sum(0)
    mismatched = np.mean([chi_square_tail(float(x), 1) < THRESHOLD for x in statistic])
    median = float(np.median(found[significant])) if significant.any() else math.nan
    return Rates(experiments, float(significant.mean()), low, high, median, float(mismatched), float(covered.mean()))


def drawn(
    generator: np.random.Generator, n: np.ndarray, shift: float, spread: float, rate: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the sum of squares of `n` values of each experiment, drawn by their exact distributions."""
    if rate is not None:
        successes = generator.binomial(n, min(max(rate + shift, 0.0), 1.0)).astype(float)
        return successes, successes
    # Of n normal values the mean is normal and, independent of it, the sum of squared deviations is chi-square.
    total = n * shift + spread * np.sqrt(n) * generator.standard_normal(len(n))
    deviations = np.where(n > 1, spread**2 * generator.chisquare(np.maximum(n - 1, 1)), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total, np.where(n > 0, deviations + total**2 / np.maximum(n, 1), 0.0)


def _difference(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of the arms' means, and its standard error as `sequences.standard_error` has it."""
    n = np.maximum(counts, 2)
    means = sums / n
    variances = np.maximum(squares - sums**2 / n, 0) / (n - 1)
    pooled = (variances * (n - 1)).sum(0) / (n - 1).sum(0)
    variances = np.where(informative(counts, sums, squares) >= THIN, variances, np.maximum(variances, pooled))
    return means[1] - means[0], np.sqrt((variances / n).sum(0))


def informative(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """`Estimate.informative` of many arms at once."""
    kish = np.divide(sums**2, squares, out=np.zeros_like(sums), where=squares > 0)
    return np.where(sums == squares, np.minimum(sums, counts - sums), kish)
