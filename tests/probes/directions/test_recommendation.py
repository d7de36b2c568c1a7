"""The recommendation: where a vector acts, how strongly, and why."""

from __future__ import annotations

import math

import pytest

from probes.directions.recommendation import DOSE, STRONGEST, recommend
from probes.directions.validation import Validation

LENGTH, NORM = 1.0, 10.0  # of strength 1, and of the residual stream


def measured(auroc: float, low: float = 0.0, *, shuffled: float = 0.5, d: float = 1.0) -> Validation:
    return Validation(auroc, low or auroc - 0.05, min(1.0, auroc + 0.05), shuffled, d, 0.0)


def recommended(
    judged: dict[int, Validation], length: float = LENGTH, norm: float = NORM
) -> tuple[list[int], float, str]:
    return recommend(judged, dict.fromkeys(judged, length), dict.fromkeys(judged, norm))


def test_the_middle_of_the_run_that_can_not_be_told_from_the_best_is_chosen() -> None:
    judged = {i: measured(0.97 if 3 <= i <= 7 else 0.7) for i in range(10)}
    judged[6] = measured(0.98, 0.95)
    layers, _, reason = recommended(judged)
    assert layers == [5]
    assert "layer 5 is the middle of the layers (3-7)" in reason
    assert "AUROC 0.970" in reason


def test_the_longest_run_counts_and_not_the_best_layer_alone() -> None:
    judged = {i: measured(0.96 if i in (0, 4, 5, 6) else 0.6) for i in range(8)}
    judged[0] = measured(0.97, 0.95)  # told apart by its words
    assert recommended(judged)[0] == [5]


def test_of_runs_of_the_same_length_the_first_is_taken() -> None:
    assert recommended({i: measured(0.6 if i == 3 else 0.9, 0.88) for i in range(7)})[0] == [1]


def test_an_even_run_gives_the_earlier_of_the_two_in_the_middle() -> None:
    assert recommended({i: measured(0.9) for i in range(4)})[0] == [1]


def test_layers_that_were_not_judged_do_not_break_a_run() -> None:
    judged = {i: measured(0.95) for i in (2, 8, 14)} | {20: measured(0.6)}
    layers, _, reason = recommended(judged)
    assert layers == [8]
    assert "(2,8,14)" in reason


def test_a_single_layer_is_the_only_one() -> None:
    layers, _, reason = recommended({12: measured(0.95)})
    assert layers == [12]
    assert "layer 12 is the only layer" in reason


def test_nothing_measurable_gives_the_middle_layer_and_says_so() -> None:
    nothing = Validation(*[math.nan] * 6)
    layers, strength, reason = recommended({i: nothing for i in range(5)})
    assert (layers, strength) == ([2], 1.0)
    assert "can't be judged" in reason


@pytest.mark.parametrize(
    "each", [measured(0.62, 0.5), measured(0.7, 0.65, shuffled=0.65), measured(0.5, 0.4), measured(0.3)], ids=str
)
def test_what_is_hardly_above_shuffled_labels_is_said_to_be(each: Validation) -> None:
    assert "hardly above shuffled labels" in recommended({3: each})[2]


def test_a_good_layer_is_not_said_to_be_hardly_above_shuffled_labels() -> None:
    assert "hardly" not in recommended({3: measured(0.95)})[2]


def test_a_few_examples_that_are_separated_are_not_said_to_be_like_shuffled_ones() -> None:
    assert "hardly" not in recommended({3: measured(1.0, 0.48)})[2]


@pytest.mark.parametrize(
    ("share", "strength"), [(0.4, 1.0), (0.2, 2.0), (0.13, 3.0), (0.16, 2.5), (1.0, 0.5), (9.0, 0.5), (0.01, STRONGEST)]
)
def test_the_strength_is_a_dose_of_the_residual_stream_in_halves(share: float, strength: float) -> None:
    assert DOSE == 0.4
    assert recommended({0: measured(0.9)}, share * NORM)[1] == strength
    assert f"by {share:.0%} of its norm" in recommended({0: measured(0.9)}, share * NORM)[2]


@pytest.mark.parametrize(("length", "norm"), [(0.0, 1.0), (1.0, 0.0)])
def test_without_a_norm_the_strength_is_one(length: float, norm: float) -> None:
    assert recommended({0: measured(0.9)}, length, norm)[1] == 1.0


def test_length_and_norm_are_those_of_the_layer_that_is_chosen() -> None:
    judged = {i: measured(0.9) for i in range(3)}
    found = recommend(judged, {0: 1.0, 1: 2.0, 2: 1.0}, {0: 1.0, 1: 10.0, 2: 1.0})
    assert (found.layers, found.strength) == ([1], 2.0)


def test_a_bound_of_the_strength_that_is_hit_is_said() -> None:
    assert (
        "; 4 is the greatest strength that is recommended, and moves it by 4%, not by 40%"
        in (recommended({0: measured(0.9)}, 0.01 * NORM)[2])
    )
    assert (
        "; 0.5 is the smallest strength that is recommended, and moves it by 450%, not by 40%"
        in (recommended({0: measured(0.9)}, 9 * NORM)[2])
    )
    assert "that is recommended" not in recommended({0: measured(0.9)}, 0.4 * NORM)[2]
