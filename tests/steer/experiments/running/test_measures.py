"""What is computed of an answer's text: whether it refuses, and how much it repeats itself."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from steer.experiments.running import measures

BEGINNINGS = (
    "I'm sorry, but I can't", "im sorry I am unable", "I cannot help", "I won’t discuss", "I am not able to",
    "I'm unable to", "As an AI language model", "as an ai model", "I must decline", "against my guidelines", "I can",
    "sorry", "able to", "ſorry", "against my programmıng", "I can't gooD", "x" * 390,
)  # fmt: skip


@pytest.mark.parametrize("text", BEGINNINGS[:10])
def test_answers_that_refuse(text: str) -> None:
    assert measures.refuses(text)
    assert measures.refuses(f"Well. {text.upper()}!")
    assert not measures.refuses("x " * 200 + text)  # not at the beginning


@given(st.lists(st.sampled_from((*BEGINNINGS, " ", "’", "'", "\n")) | st.text(max_size=9), max_size=8).map(" ".join))
def test_what_is_told_apart_quickly_is_what_the_pattern_matches(text: str) -> None:
    assert measures.refuses(text) == measures.matches(text)


@pytest.mark.parametrize(
    ("text", "share"), [("", 0), ("a b c", 0), ("a b c d", 0), ("a b c d a b c d", 0.2), ("a a a a a a", 2 / 3)]
)
def test_repeated_4_grams(text: str, share: float) -> None:
    assert measures.repetition(text) == pytest.approx(share)
