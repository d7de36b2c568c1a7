"""Simulated experiments with adaptive weights, for the self-test: how often the selection errs, and how soon it is."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from steer.experiments.statistics import track_and_stop
from steer.experiments.statistics.bounds import wilson
from steer.experiments.statistics.sample_ratio import THRESHOLD, tail_of
from steer.experiments.statistics.sequences import ALPHA
from steer.experiments.statistics.simulation import drawn, informative


class Arms(NamedTuple):
    """The true means of the arms, of which the greatest is the best: rates of yes or no, or with a `spread` the means
    of normal values with this standard deviation. `weights` are those at the beginning, by default equal."""

    means: tuple[float, ...]
    spread: float | None = None
    weights: tuple[float, ...] = ()


class Selections(NamedTuple):
    """Of `experiments`: the share that selected an arm, and of all the share that selected one whose mean is below the
    best by `epsilon` or more, with its interval; the median units until a selection, and how often shares were refused.
    """

    experiments: int
    decided: float
    wrong: float
    low: float
    high: float
    median_units: float
    mismatched: float


def select(
    arms: Arms, *, epsilon: float, units: int, smallest_share: float = 0.05, looks: int = 40, experiments: int = 500,
    delta: float = ALPHA, seed: int = 0,
) -> Selections:  # fmt: skip
    """Experiments of `units` units in all, whose weights change after each of `looks` equal steps.

    All run at once, step by step, on running sums [experiments, arms] float64. The check of the shares is at the end.
    """
    generator, means, shape = np.random.default_rng(seed), np.array(arms.means), (experiments, len(arms.means))
    counts, sums, squares, differences = (np.zeros(shape) for _ in range(4))
    covariances = np.zeros((*shape, shape[1]))
    shares = np.broadcast_to(np.array(arms.weights or [1 / len(means)] * len(means)), shape).copy()
    selected, needed = np.full(experiments, -1), np.full(experiments, math.inf)
    ends = np.linspace(0, units, looks + 1).round().astype(int)
    for start, end in itertools.pairwise(ends):
        new = generator.multinomial(end - start, shares)
        total, of_squares = _drawn(generator, new, arms)
        counts, sums, squares = counts + new, sums + total, squares + of_squares
        differences += new - (end - start) * shares
        diagonal = np.einsum("ea,ab->eab", shares, np.eye(len(means)))
        covariances += (end - start) * (diagonal - shares[:, :, None] * shares[:, None, :])
        estimates, variances = _estimates(counts, sums, squares)
        varied = np.asarray((variances > 0).all(-1)) & track_and_stop.enough(counts)
        variances = np.where(varied[:, None], variances, 1.0)
        found = track_and_stop.evidence(estimates, variances, counts, epsilon, delta)
        now = varied & found.decided & (selected < 0)
        selected, needed = np.where(now, found.leader, selected), np.where(now, end, needed)
        optimal = track_and_stop.optimal_weights(estimates, variances, epsilon)
        optimal = np.where((selected >= 0)[:, None], np.eye(len(means))[selected], optimal)
        following = track_and_stop.next_shares(optimal, smallest_share)
        shares = np.where(varied[:, None], following, shares)
    decided = selected >= 0
    wrong = decided & (means[selected] <= means.max() - epsilon * (1 - 1e-9))
    pairs = zip(differences, covariances, strict=True)
    return Selections(
        experiments, float(decided.mean()), float(wrong.mean()), *wilson(int(wrong.sum()), experiments),
        float(np.median(needed[decided])) if decided.any() else math.nan,
        float(np.mean([tail_of(*pair) < THRESHOLD for pair in pairs])),
    )  # fmt: skip


def _drawn(generator: np.random.Generator, new: np.ndarray, arms: Arms) -> tuple[np.ndarray, np.ndarray]:
    """The sums and the sums of squares of so many new values of each experiment and arm."""
    pairs = [
        drawn(generator, new[:, arm], mean if arms.spread is not None else 0.0, arms.spread or 0.0,
              mean if arms.spread is None else None)
        for arm, mean in enumerate(arms.means)
    ]  # fmt: skip
    return np.stack([total for total, _ in pairs], -1), np.stack([squares for _, squares in pairs], -1)


def _estimates(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arms' means, and variances as the server takes them."""
    n = np.maximum(counts, 2)
    variances = np.maximum(squares - sums**2 / n, 0) / (n - 1)
    return sums / n, track_and_stop.believable_variances(variances, n, informative(counts, sums, squares))
