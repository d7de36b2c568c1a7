"""`steer ab selftest` on configurations of a file."""

from __future__ import annotations

from pathlib import Path

import trials
from trials import Ab

from steer.experiments import document, selftest
from steer.experiments.planning import plan


def test_the_planned_units_have_the_planned_power_and_few_false_positives(tmp_path: Path, ab: Ab) -> None:
    trials.written(tmp_path, metric={"name": "thumbs", "smallest_effect": 0.1, "baseline": 0.4})
    status, data, _ = ab("selftest", "tone")
    assert (status, data["passed"]) == (0, True)
    assert data["units"] == plan(document.read(tmp_path / "tone.yaml")).units
    assert data["same"]["significant"] <= 0.05
    assert data["same"]["covered"] >= 0.95
    assert data["apart"]["significant"] > 0.75  # 0.8 at the last analysis is planned
    assert data["apart"]["median_units"] < data["units"]


def test_several_arms_share_the_level(tmp_path: Path) -> None:
    arms = {"control": {}, "a": {"steer": "1.2*warm"}, "b": {"steer": "0.5*warm"}}
    trials.written(tmp_path, arms=arms, metric={"name": "thumbs", "smallest_effect": 0.1})
    found = selftest.selftest(document.read(tmp_path / "tone.yaml"), units=2000)
    assert (found["level"], found["units"]) == (0.975, 2000)
    assert found["same"]["significant"] <= 0.025


def test_a_file_without_the_spread_says_what_is_missing(tmp_path: Path, ab: Ab) -> None:
    trials.written(tmp_path, metric={"name": "response_tokens", "smallest_effect": 5})
    status, data, _ = ab("selftest", "tone")
    assert (status, "metric.spread" in data["error"]) == (2, True)


def test_adaptive_weights_are_simulated_as_they_are(tmp_path: Path, ab: Ab) -> None:
    arms = {"control": {}, "a": {"steer": "1.2*warm"}, "b": {"steer": "0.5*warm"}}
    metric = {"name": "response_tokens", "smallest_effect": 5, "spread": 20}
    trials.written(tmp_path, arms=arms, metric=metric, allocation={"method": "track-and-stop"})
    status, data, _ = ab("selftest", "tone")
    assert (status, data["passed"]) == (0, True)
    assert data["units"] == 2 * (plan(document.read(tmp_path / "tone.yaml")).units or 0)
    assert data["apart"]["wrong"] <= 0.05 < 0.8 < data["apart"]["decided"]
    assert data["apart"]["mismatched"] <= 0.01
    assert data["apart"]["median_units"] < data["same"]["median_units"]
    assert 2 * ab("check", "tone")[1]["units_needed"] == data["units"]
