"""Numbers, switches and words are read alike from YAML and from `--set`."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vectors.documents.numbers import number
from vectors.documents.yaml_text import parse as load_yaml
from vectors.errors import UsageError
from vectors.registry.options import Option
from vectors.registry.values import read_assignments, read_value

NUMBERS = {
    "5e-4": 5e-4,
    "5E-4": 5e-4,
    "1e-3": 1e-3,
    "1e3": 1000.0,
    "+2e+1": 20.0,
    "-5e-9": -5e-9,
    ".5": 0.5,
    "-.5": -0.5,
    "5.": 5.0,
    "0.9": 0.9,
    "1.5e-05": 1.5e-5,
    "0": 0,
    "7": 7,
    "-3": -3,
    "010": 10,
    "1_000": 1000,
    "0x1f": 31,
}
WORDS = ["l1", "none", "e5", "5e", "1:30", "1__0", "1.2.3", "inf", "nan", "1e-", "before"]
SWITCHES = {"true": True, "false": False, "True": True, "FALSE": False}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_a_number_is_a_number_wherever_it_is_written(text: str, value: float) -> None:
    for found in (
        load_yaml(f"eps: {text}")["eps"],
        load_yaml(f"[{text}]")[0],
        read_value(text),
        read_assignments([f"eps={text}"])["eps"],
        number(text),
    ):
        assert found == value
        assert type(found) is type(value)
    if not text.startswith("0x"):
        assert float(text) == value  # as Python reads it


@pytest.mark.parametrize("text", WORDS)
def test_what_is_no_number_stays_text(text: str) -> None:
    assert read_value(text) == text
    assert load_yaml(f"{{a: {text!r}}}") == {"a": text}


@pytest.mark.parametrize(("text", "value"), SWITCHES.items())
def test_switches_are_true_and_false(text: str, value: bool) -> None:
    assert read_value(text) is value
    assert load_yaml(text) is value


def test_quoted_numbers_are_text_in_yaml_and_numbers_to_an_option_that_takes_numbers() -> None:
    assert load_yaml('"0.9"') == "0.9"
    assert Option("density", 0.2, "").read("0.9") == 0.9
    assert Option("rescale", "none", "", choices=("none", "l1")).read("l1") == "l1"
    assert read_value('"0.9"') == 0.9


@pytest.mark.parametrize(
    ("text", "shown"), [(".nan", "nan"), (".inf", "inf"), ("-.inf", "-inf"), ("1e999", "inf"), ("nan", "'nan'")]
)
def test_what_is_not_finite_is_refused_with_its_value(text: str, shown: str) -> None:
    assert Option("eps", 1e-8, "").problem_of(read_value(text)) == f"eps is {shown}, not a number"


def test_whole_numbers_of_any_length_are_refused_where_they_are_too_large() -> None:
    for digits in ("9" * 350, "9" * 5000):
        assert "not a number" in str(Option("eps", 1e-8, "").problem_of(read_value(digits)))
    assert math.isinf(read_value("9" * 5000))


def test_lists_and_filters_are_values_too() -> None:
    expected: dict[str, Any] = {"density": [0.1, 5e-4], "weight": [{"filter": "mlp", "value": 1e-3}]}
    assert read_assignments(["density=[0.1, 5e-4]", "weight=[{filter: mlp, value: 1e-3}]"]) == expected


def test_every_assignment_that_is_none_is_reported() -> None:
    with pytest.raises(UsageError) as caught:
        read_assignments(["eps", "=1", "a=", "b=[1", "good=1"])
    assert len(caught.value.problems) == 4
    assert "--set 'b=[1' has a value that can't be read" in caught.value.problems[3]
