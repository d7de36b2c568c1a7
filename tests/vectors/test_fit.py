"""A strength far beyond the one that a vector's file recommends is refused, unless it is allowed on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vectors.errors import ExpressionError
from vectors.expression import parse
from vectors.fit import problems_of_strength
from vectors.resolve import compose
from vectors.steering import SteeringVector


def vector(recommended: Any = None) -> SteeringVector:
    metadata = {} if recommended is None else {"recommended": recommended}
    return SteeringVector({0: torch.ones(4)}, metadata=metadata)


WARM = vector({"strength": 2.0, "layers": [0]})


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("40*warm", []),
        ("-40*warm + 20*other", []),
        ("40.1*warm", ["warm has strength 40.1, 20.1 times the 2 recommended"]),
        ("1e30*warm", ["warm has strength 1e+30, 5e+29 times the 2 recommended"]),
        ("-1e9*warm@first:3", ["warm has strength 1e+09, 5e+08 times the 2 recommended"]),
        ("30*warm - 30*warm@response", ["warm has strength 60, 30 times the 2 recommended"]),
        ("clamp(warm, 41)", ["warm has strength 41, 20.5 times the 2 recommended"]),
        ("ablate(warm)", []),
        ("ablate(warm, 1e9)", ["ablate(warm) has strength 1e+09; 1 removes the direction"]),
        ("1e9*other", []),
    ],
)
def test_twenty_times_the_recommended_strength_is_the_limit(text: str, problems: list[str]) -> None:
    vectors = {"warm": WARM, "other": vector()}
    assert problems_of_strength(parse(text), vectors) == problems
    if not problems:
        compose(text, vectors)
        return
    with pytest.raises(ExpressionError, match=r"recommended|removes") as caught:
        compose(text, vectors)
    assert caught.value.hint.endswith("--allow-strength")
    compose(text, vectors, allow_strength=True)


def test_the_strength_that_scales_an_expression_counts() -> None:
    with pytest.raises(ExpressionError, match="strength 41"):
        compose("warm", {"warm": WARM}, 41.0)


@pytest.mark.parametrize("recommended", [5, "2", [], {}, {"strength": "2"}, {"strength": True}, {"strength": 0}])
def test_without_a_recommendation_there_is_no_limit(recommended: Any) -> None:
    assert problems_of_strength(parse("1e9*v"), {"v": vector(recommended)}) == []
