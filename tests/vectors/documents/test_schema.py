"""Values are checked field by field, and every problem names its field, what was expected and what stands there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vectors.documents.artifacts import STEERING, TASK
from vectors.documents.schema import (
    MOST,
    boolean,
    either,
    excerpt,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    problems_of,
    record,
    text,
    whole,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
FIELDS = ("base", "apply", "method", "measured", "recommended", "parents", "licence", "storage", "parameters", "shard")


@pytest.mark.parametrize(
    ("check", "value", "problem"),
    [
        (text(), 5, "x is 5, not text"),
        (text("[a-z]+", "lower-case letters"), "A", 'x is "A", not lower-case letters'),
        (whole(0, 9), True, "x is true, not a whole number from 0 to 9"),
        (whole(0, 9), 10, "x is 10, not a whole number from 0 to 9"),
        (whole(0, 9), 10**4000, "x is a number of about 3986 digits, not a whole number from 0 to 9"),
        (number, float("nan"), "x is nan, not a finite number"),
        (number, 10**400, "x is a number of about 398 digits, not a finite number"),
        (boolean, 0, "x is 0, not true or false"),
        (one_of("F32", 1), True, 'x is true, not "F32" or 1'),
        (list_of(text()), {"a": 1}, 'x is an object with the keys "a", not a list'),
        (list_of(whole(0, 9)), [1, "2"], 'x[1] is "2", not a whole number from 0 to 9'),
        (mapping_of(number), [], "x is an empty list, not an object"),
        (mapping_of(number), {"a": {}}, "x.a is an empty object, not a finite number"),
        (record({"digest": text()}), {}, "x.digest is missing"),
        (record({}, {"name": text()}), {"name": [1]}, "x.name is a list of 1 value, not text"),
        (either(number, text(), wanted="a number or text"), None, "x is null, not a number or text"),
    ],
)
def test_a_problem_names_the_field_what_was_expected_and_what_is_there(check: Any, value: Any, problem: str) -> None:
    assert problems_of(value, check, "x") == [problem]


def test_fields_that_a_schema_does_not_name_are_allowed() -> None:
    assert problems_of({"digest": "d", "more": [1]}, record({"digest": text()}, {"name": optional(text())})) == []


def test_problems_and_excerpts_are_bounded_whatever_the_value() -> None:
    assert len(problems_of(["x"] * 10_000, list_of(number))) == MOST + 1
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10**6, 10**10**5, {"k" * 10**6: 1}, deep, b"x" * 10**6):
        assert len(excerpt(value)) < 300


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_the_schemas_of_artifacts_take_any_value(metadata: dict[str, Any]) -> None:
    for schema in (STEERING, TASK):
        assert all(isinstance(problem, str) for problem in problems_of(metadata, schema))
