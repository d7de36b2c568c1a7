"""Scopes become phases: which terms act on which token, compared with asking every term at every position."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from steer.serving.engine.phases import Phase, acting, counts, edges, phases, slots_needed
from vectors.expression import Composition, Scope, Term, parse

scopes = st.one_of(
    st.none(),
    st.sampled_from([Scope("prompt"), Scope("response")]),
    st.builds(Scope, st.sampled_from(["first", "after"]), st.integers(0, 6)),
)
terms = st.builds(
    Term, st.sampled_from(["add", "ablate", "clamp"]), st.sampled_from("abc"), st.sampled_from([0.0, 1.0]), scope=scopes
)
compositions = st.builds(lambda found: Composition(tuple(found)), st.lists(terms, min_size=1, max_size=5))


def covers(term: Term, prompt: int, position: int) -> bool:
    """The obvious reference: whether a term acts on a token."""
    if not acting(term):
        return False
    start, stop = term.scope.span(prompt) if term.scope else (0, float("inf"))
    return start <= position < stop


@given(compositions, st.integers(1, 5))
def test_at_every_position_the_phase_holds_the_terms_that_cover_it(composition: Composition, prompt: int) -> None:
    found = phases(composition)
    begins = edges(found, prompt)
    for position in range(20):
        at = max(i for i, begin in enumerate(begins) if begin <= position)
        expected = tuple(i for i, term in enumerate(composition.terms) if covers(term, prompt, position))
        assert found[at].terms == expected


@given(compositions, st.integers(1, 5), st.integers(0, 20))
def test_a_receipt_counts_each_term_token_by_token(composition: Composition, prompt: int, end: int) -> None:
    for term, (of_prompt, of_response) in zip(composition.terms, counts(composition, prompt, end), strict=True):
        covered = [position for position in range(end) if covers(term, prompt, position)]
        assert of_prompt == sum(position < prompt for position in covered)
        assert of_response == sum(position >= prompt for position in covered)


@given(compositions)
def test_a_row_is_needed_for_every_set_of_terms_that_acts_together(composition: Composition) -> None:
    sets = {tuple(covers(t, 3, position) for t in composition.terms) for position in range(20)}
    assert slots_needed(composition) == sum(any(one) for one in sets)


def test_without_a_scope_there_is_one_phase_from_the_beginning_on() -> None:
    assert phases(parse("a + ablate(b)")) == (Phase(float("-inf"), (0, 1)),)


@pytest.mark.parametrize(("text", "rows"), [("0*a", 0), ("a", 1), ("a@prompt", 1), ("a@first:2", 1), ("a@prompt+b", 2)])
def test_rows_of_an_expression(text: str, rows: int) -> None:
    assert slots_needed(parse(text)) == rows


def test_strength_zero_acts_nowhere_but_a_clamp_to_zero_does() -> None:
    assert phases(parse("0*a + ablate(b, 0)"))[0].terms == ()
    assert phases(parse("clamp(a, 0)"))[0].terms == (0,)
