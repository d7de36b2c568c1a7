"""When a composition acts: scopes cut a sequence into phases, and in each phase the same terms act on every token.

A phase takes one slot of the table, so a scope costs nothing while a step runs. Positions count from the first token of
the request's true prompt, so chunked prefill, preemption and caching change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vectors.expression import Composition, Term

PROBE = 1 << 40  # a prompt length beyond any, so that ends before and behind the prompt's last token tell apart


class Phase(NamedTuple):
    """Terms that act together, from `start` tokens after the end of the prompt on; -inf is the sequence's beginning."""

    start: float
    terms: tuple[int, ...]  # places in the composition


def acting(term: Term) -> bool:
    """Whether a term can change anything: strength 0 can't, a clamp to 0 can."""
    return term.operation == "clamp" or term.value != 0


def phases(composition: Composition) -> tuple[Phase, ...]:
    """The phases of a composition in their order; the last has no end. A phase in which nothing acts has no terms."""
    spans = []
    for place, term in enumerate(composition.terms):
        if acting(term):
            start, stop = term.scope.span(PROBE) if term.scope else (0.0, math.inf)
            spans.append((_relative(start), _relative(stop), place))
    starts = sorted({-math.inf, *(start for start, _, _ in spans), *(stop for _, stop, _ in spans)} - {math.inf})
    found: list[Phase] = []
    for start in starts:
        terms = tuple(place for low, high, place in spans if low <= start < high)
        if not found or found[-1].terms != terms:
            found.append(Phase(start, terms))
    return tuple(found)


def slots_needed(composition: Composition) -> int:
    """Rows of the table that a composition takes: one for each set of terms that acts together."""
    return len({phase.terms for phase in phases(composition) if phase.terms})


def edges(found: Sequence[Phase], prompt_length: int) -> list[int]:
    """The first position of every phase in a sequence with this prompt."""
    return [0 if phase.start == -math.inf else int(prompt_length + phase.start) for phase in found]


def counts(composition: Composition, prompt_length: int, end: int) -> list[tuple[int, int]]:
    """For each term, on how many prompt and response tokens it acted, when positions [0, end) were computed."""
    result = []
    for term in composition.terms:
        start, stop = term.scope.span(prompt_length) if term.scope else (0, math.inf)
        low, high = max(0, start), min(end, stop) if acting(term) else 0
        prompt = max(0, min(high, prompt_length) - low)
        response = max(0, high - max(low, prompt_length))
        result.append((int(prompt), int(response)))
    return result


def _relative(position: float) -> float:
    """A position in a sequence with the long prompt, counted from the prompt's end."""
    return position if math.isinf(position) else (-math.inf if position < PROBE else position - PROBE)
