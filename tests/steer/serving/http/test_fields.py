"""Keys of requests that look like ours: what is remembered of them is what comparing them says."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from steer.serving.http import fields

WORDS = ("steer", "stear", "Steering", "extra_args", "vllm-xargs", "samplingParams", "model", "user", "x" * 70)


@given(st.sampled_from(WORDS) | st.text(max_size=70), st.text(max_size=2), st.integers(0, 9))
def test_the_kind_of_a_key_is_what_comparing_it_says(word: str, more: str, at: int) -> None:
    key = word[:at] + more + word[at:]
    assert fields.kind_of_key(key) == fields.kind_of_key(key) == fields.compared(key)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("steer", (True, False)), ("STEER_arm", (True, False)), ("stear", (True, False)), ("temperature", (False, False)),
     ("extra_bdy", (False, True)), ("vllm_xargs", (False, True)), ("s" * 10_000, (False, False))],
)  # fmt: skip
def test_kinds_of_keys(key: str, kind: tuple[bool, bool]) -> None:
    assert fields.kind_of_key(key) == kind


@pytest.mark.parametrize(
    ("value", "true"),
    [(None, False), (True, True), (False, False), ("true", True), ("off", False), (1, True), ([], False)],
)  # fmt: skip
def test_what_vllm_takes_for_true(value: object, true: bool) -> None:
    assert fields.is_true(value) is true
