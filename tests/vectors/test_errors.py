"""Errors quote what others wrote, so they are bounded where they are made."""

from __future__ import annotations

import pytest

from vectors.errors import LONGEST, MOST, SteerError, UsageError, bounded, cut, raise_together


def test_the_middle_of_a_long_problem_is_left_out_and_that_is_said() -> None:
    error = SteerError("name " + "x" * 10**6 + " is not a file", "write " + "y" * 10**6)
    assert len(str(error)) < LONGEST + 100
    assert str(error).startswith("name xxx")
    assert str(error).endswith("xxx is not a file")
    assert "more characters) …" in str(error)
    assert len(error.hint) < LONGEST + 100
    assert cut("short") == "short"


def test_many_problems_are_counted() -> None:
    error = SteerError(["problem"] * (MOST + 7))
    assert len(error.problems) == MOST + 1
    assert error.problems[-1] == "and 7 more problems"
    assert bounded(["x"] * 5, 2) == ["x", "x", "and 3 more problems"]


def test_errors_raised_together_stay_bounded() -> None:
    with pytest.raises(UsageError) as caught:
        raise_together([kind([f"{kind}{i} {'x' * 10**5}" for i in range(80)]) for kind in (SteerError, UsageError)])
    assert len(str(caught.value)) < (LONGEST + 100) * (MOST + 1)
    assert caught.value.problems[-1] == "and 60 more problems"
