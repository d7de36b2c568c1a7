"""How many units an experiment needs: against a simulation of it, and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steer.experiments.planning import POWER, plan
from steer.experiments.specification import Arm, Experiment, Metric
from steer.experiments.statistics.sequences import half_width


def experiment(metric: Metric, weights: tuple[float, ...] = (0.5, 0.5)) -> Experiment:
    arms = tuple(Arm(f"arm{i}", weight, "warm" if i else "") for i, weight in enumerate(weights))
    return Experiment("tone", arms, metric, "salt")


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
def test_the_difference_that_matters_is_seen_as_often_as_stated(weights: tuple[float, float]) -> None:
    units = plan(experiment(Metric("length", "number", smallest_effect=2.0, spread=10.0), weights)).units
    assert units is not None
    counts = [round(units * weight) for weight in weights]
    random, seen, trials = np.random.default_rng(0), 0, 4000
    means = [random.normal(2.0 * i, 10 / math.sqrt(count), trials) for i, count in enumerate(counts)]
    error = 10 * math.sqrt(sum(1 / count for count in counts))
    seen = int(np.sum(np.abs(means[1] - means[0]) > half_width(error, sum(counts))))
    assert abs(seen / trials - POWER) < 0.03


def test_a_smaller_effect_or_share_needs_more_units() -> None:
    def needed(effect: float, *weights: float, baseline: float | None = None) -> int:
        units = plan(experiment(Metric("thumbs", smallest_effect=effect, baseline=baseline), weights)).units
        assert units is not None
        return units

    assert needed(0.05, 0.5, 0.5) < needed(0.025, 0.5, 0.5)
    assert needed(0.05, 0.5, 0.5) < needed(0.05, 0.9, 0.1)
    assert needed(0.05, 0.5, 0.5, baseline=0.1) < needed(0.05, 0.5, 0.5)
    assert needed(0.05, 0.5, 0.5) < needed(0.05, 0.4, 0.3, 0.3)
    assert needed(0.99, 0.5, 0.5) >= 200  # the fewest with which anything is concluded


@pytest.mark.parametrize(
    ("metric", "missing"),
    [(Metric("thumbs"), "smallest_effect"), (Metric("length", "number", smallest_effect=1.0), "spread")],
)
def test_what_is_not_known_is_named(metric: Metric, missing: str) -> None:
    units, named = plan(experiment(metric))
    assert units is None
    assert missing in named
