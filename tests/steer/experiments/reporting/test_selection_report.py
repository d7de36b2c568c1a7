"""`steer ab report`, `status` and `promote` of an experiment with adaptive weights: a selection, and no estimation."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trials import Ab, Log

from steer.experiments.reporting import adaptive
from steer.experiments.reporting.report import report
from steer.experiments.statistics.moments import Estimate
from steer.experiments.statistics.sequences import half_width
from steer.experiments.storage import epochs
from steer.experiments.storage.database import write
from steer.experiments.storage.epochs import Epoch

ARMS = {"control": {}, "friendly": {"steer": "1.2*warm"}, "more": {"steer": "2*warm"}}
FIRST = {"control": 1 / 3, "friendly": 1 / 3, "more": 1 / 3}
LATER = {"control": 0.1, "friendly": 0.2, "more": 0.7}


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """A served experiment with adaptive weights."""
    metric = {"name": "response_tokens", "smallest_effect": 2, "spread": 5}
    allocation = {"method": "track-and-stop", "smallest_share": 0.1}
    return Log(tmp_path, f"sqlite:///{tmp_path}/log.db", arms=ARMS, metric=metric, allocation=allocation)


def answers(log: Log, counts: dict[str, int], epoch: int, mean: dict[str, float]) -> None:
    chosen = random.Random(epoch)
    rows = [
        log.answer(arm, f"{arm} {epoch} {i}", epoch=epoch, response_tokens=round(mean[arm] + chosen.gauss(0, 5)),
                   at=1e9 + 3600 * epoch + i)
        for arm, count in counts.items() for i in range(count)
    ]  # fmt: skip
    write(log.engine, [("exposures", row) for row in rows])


BETTER, CLOSE = {"control": 20.0, "friendly": 20.0, "more": 30.0}, {"control": 20.0, "friendly": 20.0, "more": 20.0}


def test_units_are_expected_by_the_weights_of_their_epochs(log: Log) -> None:
    answers(log, {"control": 150, "friendly": 150, "more": 150}, 0, CLOSE)
    epochs.begin(log.engine, "tone", 1, Epoch(1, LATER, "more leads"))
    answers(log, {"control": 50, "friendly": 100, "more": 350}, 1, CLOSE)
    found = report(log.engine, log.experiment, log.version)
    assert (found["sample_ratio"]["healthy"], found["sample_ratio"]["p"]) == (True, pytest.approx(1.0))
    assert [epoch["units"] for epoch in found["allocation"]["epochs"]] == [
        {"control": 150, "friendly": 150, "more": 150}, {"control": 50, "friendly": 100, "more": 350},
    ]  # fmt: skip
    answers(log, {"control": 50}, 1, CLOSE)  # the same units once more
    assert report(log.engine, log.experiment, log.version)["sample_ratio"]["p"] == pytest.approx(1.0)
    answers(log, {"control": 100}, 0, CLOSE)
    write(log.engine, [("exposures", log.answer("control", f"lost {i}", epoch=1)) for i in range(90)])
    found = report(log.engine, log.experiment, log.version)
    assert (found["sample_ratio"]["healthy"], found["metrics"], found["decisions"]) == (False, [], {})
    assert (found["allocation"]["state"], found["allocation"]["against"]) == ("unhealthy", {})


def test_the_verdict_is_a_selection_and_no_arm_is_shipped_or_rolled_back(log: Log, ab: Ab) -> None:
    answers(log, {"control": 120, "friendly": 120, "more": 120}, 0, BETTER)
    status, found, _ = ab("report", "tone")
    selection = found["allocation"]
    assert (status, selection["label"], selection["state"]) == (0, "selection, not estimation", "selected")
    assert (selection["selected"], selection["leader"], selection["error_rate"]) == ("more", "more", 0.05)
    assert set(selection["against"]) == {"control", "friendly"}
    assert all(each["evidence"] > each["threshold"] for each in selection["against"].values())
    assert (found["decisions"], found["over_time"]) == ({}, {})
    (metric,) = found["metrics"]
    shown = metric["differences"]["more"]
    assert (shown["p"], shown["interval"]) == (None, "confidence sequence of each arm")
    assert shown["low"] == pytest.approx(metric["arms"]["more"]["low"] - metric["arms"]["control"]["high"])
    assert shown["low"] < 10 < shown["high"]


def test_the_first_selection_stays(log: Log) -> None:
    answers(log, {"control": 120, "friendly": 120, "more": 120}, 0, CLOSE)
    found = report(log.engine, log.experiment, log.version)["allocation"]
    assert (found["state"], found["selected"]) == ("not decided", None)
    assert found["reason"].startswith(f"{found['leader']} leads; the evidence against")
    epochs.begin(log.engine, "tone", 1, Epoch(1, LATER, "friendly is selected", "friendly"))
    found = report(log.engine, log.experiment, log.version)["allocation"]
    assert (found["state"], found["selected"], found["reason"]) == ("selected", "friendly", "friendly is selected")


def test_a_selected_arm_outside_of_a_guardrail_is_none(log: Log, ab: Ab) -> None:
    answers(log, {"control": 120, "friendly": 120, "more": 120}, 0, {**BETTER, "more": 60.0})
    status, found, _ = ab("report", "tone")
    assert (status, found["allocation"]["state"]) == (1, "breached")
    status, found, _ = ab("promote", "tone", "more")
    assert (status, "length_ratio" in found["error"]) == (1, True)


def test_promote_takes_the_selected_arm_and_no_other(log: Log, ab: Ab) -> None:
    status, found, _ = ab("promote", "tone", "control")
    assert (status, "fewer than 100 units" in found["error"]) == (1, True)
    answers(log, {"control": 120, "friendly": 120, "more": 120}, 0, BETTER)
    for arm in ("control", "friendly"):
        status, found, _ = ab("promote", "tone", arm)
        assert (status, "more is selected" in found["error"]) == (1, True)
    status, found, _ = ab("promote", "tone", "more")
    assert (status, found["decision"], found["forced"]) == (0, "selected", False)
    status, found, _ = ab("promote", "tone", "friendly", "--force")
    assert (status, found["decision"], found["forced"]) == (0, "not selected", True)


def test_status_has_the_epoch_and_its_weights(log: Log, ab: Ab) -> None:
    assert ab("status", "tone")[1]["allocation"]["epoch"] == 0
    epochs.begin(log.engine, "tone", 1, Epoch(1, LATER, "more leads"))
    found = ab("status", "tone")[1]["allocation"]
    assert (found["epoch"], found["weights"], found["reason"], found["selected"]) == (1, LATER, "more leads", None)


def test_the_page_has_the_selection_and_the_weights_over_time(log: Log, ab: Ab, tmp_path: Path) -> None:
    answers(log, {"control": 120, "friendly": 120, "more": 120}, 0, CLOSE)
    epochs.begin(log.engine, "tone", 1, Epoch(1, LATER, "<b>more</b> leads"))
    ab("report", "tone", "--html")
    page = (tmp_path / "tone-report.html").read_text()
    assert "<h2>Selection, not estimation</h2>" in page
    assert "&lt;b&gt;more&lt;/b&gt; leads" in page
    assert "Effect over time" not in page
    assert "share of new units" in page


def test_intervals_of_all_arms_hold_at_every_look_under_weights_that_follow_the_results() -> None:
    """The worst weights for an ordinary interval: an arm gets more units while its mean is low."""
    generator, missed, trials = np.random.default_rng(0), 0, 150
    for _ in range(trials):
        counts, sums, squares = np.zeros(3), np.zeros(3), np.zeros(3)
        for step in range(30):
            weights = np.full(3, 1 / 3) if step < 6 else np.where(sums / counts == min(sums / counts), 0.8, 0.1)
            for arm, count in enumerate(generator.multinomial(60, weights)):
                values = generator.normal(0, 1, count)
                counts[arm] += count
                sums[arm] += values.sum()
                squares[arm] += (values**2).sum()
            variances = (squares - sums**2 / counts) / (counts - 1)
            known = {
                str(arm): Estimate(int(counts[arm]), float(sums[arm] / counts[arm]), float(variances[arm]))
                for arm in range(3)
            }
            if any(low > 0 or high < 0 for low, high in adaptive.intervals(known).values()):
                missed += 1
                break
    assert missed / trials <= 0.05


def test_an_interval_is_the_sequence_in_the_units_of_its_arm() -> None:
    known: dict[str, Any] = {"a": Estimate(400, 3.0, 4.0), "b": Estimate(99, 3.0, 4.0)}
    found = adaptive.intervals(known)
    assert found["a"][1] - 3 == pytest.approx(half_width(0.1, 400, 0.025, 2500))
    assert math.isnan(found["b"][0])
