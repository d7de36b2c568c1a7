"""The recommendation: where a vector acts, how strongly, and why."""

from __future__ import annotations

import math

import pytest

from probes.directions.calibration import Calibration, Point
from probes.directions.recommendation import CANDIDATES, candidates, recommend
from probes.directions.validation import Validation


def measured(auroc: float, low: float = 0.0, *, shuffled: float = 0.5, d: float = 1.0) -> Validation:
    return Validation(auroc, low or auroc - 0.05, min(1.0, auroc + 0.05), shuffled, d, 0.0)


def calibration(*points: Point, lowered: float | None = None, repeated: float = 0.1) -> Calibration:
    chosen = max(points, key=lambda point: point.effect)
    return Calibration(list(points), chosen if lowered is None else chosen._replace(strength=lowered), 0.1, repeated)


def test_without_a_calibration_the_middle_of_the_run_that_can_not_be_told_from_the_best_is_chosen() -> None:
    judged = {i: measured(0.97 if 3 <= i <= 7 else 0.7) for i in range(10)}
    judged[6] = measured(0.98, 0.95)
    layers, strength, reason, _ = recommend(judged)
    assert (layers, strength) == ([5], 1.0)
    assert "layer 5 is the middle of the best layers (3-7), with held-out AUROC 0.970" in reason
    assert "not calibrated" in reason


def test_the_longest_run_counts_and_not_the_best_layer_alone() -> None:
    judged = {i: measured(0.96 if i in (0, 4, 5, 6) else 0.6) for i in range(8)}
    judged[0] = measured(0.97, 0.95)  # told apart by its words
    assert recommend(judged)[0] == [5]


def test_of_runs_of_the_same_length_the_first_is_taken() -> None:
    assert recommend({i: measured(0.6 if i == 3 else 0.9, 0.88) for i in range(7)})[0] == [1]


def test_of_an_even_number_of_layers_the_lower_middle_is_taken() -> None:
    assert recommend({i: measured(0.9) for i in range(4)})[0] == [1]


def test_layers_that_were_not_extracted_leave_no_gap() -> None:
    layers, _, reason, _ = recommend({i: measured(0.9) for i in (2, 4, 6)})
    assert layers == [4]
    assert "(2,4,6)" in reason


def test_the_only_layer_is_the_only_one() -> None:
    layers, _, reason, _ = recommend({12: measured(0.95)})
    assert layers == [12]
    assert "is the only layer" in reason


def test_a_single_example_can_not_be_judged() -> None:
    nothing = Validation(*[math.nan] * 6)
    assert candidates({i: nothing for i in range(5)}, 5) == [2]
    layers, strength, reason, _ = recommend({i: nothing for i in range(5)})
    assert (layers, strength) == ([2], 1.0)
    assert "can't be judged" in reason
    calibrated = recommend({i: nothing for i in range(5)}, calibration(Point(2, 0.4, 0.0, 0.09, True)), 0.1)
    assert calibrated[:2] == ([2], 0.4)
    assert "budget 0.1" in calibrated.reason


@pytest.mark.parametrize("each", [measured(0.7, 0.55), measured(0.55, 0.5), measured(0.95, 0.9, shuffled=0.9)])
def test_what_is_hardly_above_chance_is_not_recommended_at_all_its_budget_allows(
    each: Validation,
) -> None:
    assert "hardly above shuffled labels" in recommend({3: each}).reason
    found = recommend({3: each}, calibration(Point(3, 6.5, 0.2, 0.43, True)), 0.5)
    assert (found.strength, found.proven) == (1.0, False)
    assert "so do not expect it to steer: strength 1 is only where to begin" in found.reason
    assert recommend({3: each}, calibration(Point(3, 0.4, 0.2, 0.43, True)), 0.5).strength == 0.4


def test_few_examples_alone_are_no_reason_to_doubt() -> None:
    assert "hardly" not in recommend({3: measured(0.95)})[2]
    assert "hardly" not in recommend({3: measured(1.0, 0.48)})[2]


def test_candidates_are_few_and_spread_over_the_run_away_from_both_ends_of_the_model() -> None:
    chosen = candidates({i: measured(0.95) for i in range(30)}, 30)
    assert len(chosen) == CANDIDATES
    assert chosen[0] == 15  # the middle of what lies between 15 % and 85 % of the depth
    assert min(chosen) >= 5
    assert max(chosen) <= 25
    assert candidates({i: measured(0.95) for i in (0, 1)}, 30) == [0, 1]  # where nothing else was extracted


def test_layers_that_separate_the_classes_nearly_as_well_as_the_best_are_candidates_too() -> None:
    """The best layers lie late, and those that steer before them: 0.95 is 92 % as far above chance as 0.99."""
    judged = {i: measured(0.95 if i < 20 else 0.99, 0.94 if i < 20 else 0.985) for i in range(30)}
    assert min(candidates(judged, 30)) < 12
    weak = {i: measured(0.9 if i < 20 else 0.99, 0.85 if i < 20 else 0.985) for i in range(30)}
    assert min(candidates(weak, 30)) >= 20


def test_the_layer_that_moves_the_margin_most_is_recommended_at_its_strength() -> None:
    judged = {i: measured(0.95) for i in range(4)}
    points = [Point(1, 0.5, 0.1, 0.09, True), Point(3, 0.3, 0.25, 0.095, True)]
    layers, strength, reason, _ = recommend(judged, calibration(*points), 0.1)
    assert (layers, strength) == ([3], 0.3)
    assert "layer 3 moves the held-out margin most of layers 1,3 (+0.25 nats per token)" in reason
    assert "strength 0.3 costs 0.095 nats on neutral text" in reason


def test_a_strength_that_was_lowered_for_the_sake_of_the_text_says_so() -> None:
    lowered = calibration(Point(1, 0.5, 0.1, 0.09, True), lowered=0.35)
    _, strength, reason, _ = recommend({1: measured(0.95)}, lowered, 0.1)
    assert strength == 0.35
    assert "lowered to 0.35, since the text repeated itself" in reason
    broken = calibration(Point(1, 0.5, 0.1, 0.09, True), lowered=0.12, repeated=0.4)
    assert "40% of the text's 4-grams are repeated even there" in recommend({1: measured(0.95)}, broken, 0.1)[2]


def test_a_margin_that_does_not_follow_the_strength_is_no_promise() -> None:
    unsteady = calibration(Point(1, 0.5, -0.1, 0.09, False))
    found = recommend({1: measured(0.95)}, unsteady, 0.1)
    assert "do not expect it to steer" in found.reason
    assert not found.proven


def test_where_no_strength_fits_the_budget_one_is_where_to_begin() -> None:
    _, strength, reason, _ = recommend({1: measured(0.95)}, calibration(Point(1, 0.0, 0.0, 0.0, True)), 0.1)
    assert strength == 1.0
    assert "no strength stays within 0.1 nats" in reason
