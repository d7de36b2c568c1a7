"""When a composition acts: scopes divide a sequence into phases, and within a phase the same terms act on every token.

A phase takes one slot, so a scope adds no work to a step. Positions count from the first token of the request's true
prompt, so they are the same under chunked prefill, preemption and prefix caching.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vectors.expression import Composition, Scope, Term

PROMPT_LENGTH = 1 << 40  # longer than any prompt: a smaller position is in the prompt, any other in the response


class Phase(NamedTuple):
    """Terms that act together, from `start` tokens after the end of the prompt; -inf: from the first token."""

    start: float
    terms: tuple[int, ...]  # indices of terms in the composition


def acting(term: Term) -> bool:
    """Whether a term can change the residual stream: strength 0 can't, a clamp to 0 can."""
    return term.operation == "clamp" or term.value != 0


def phases(composition: Composition) -> tuple[Phase, ...]:
    """The phases of a composition in order; the last one is open-ended. A phase may have no terms."""
    return tuple(Phase(start, _bits(mask)) for start, mask in _masks(composition))


def slots_needed(composition: Composition) -> int:
    """The number of slots that a composition takes: one for each set of terms that acts together."""
    return size(composition)[0]


def size(composition: Composition) -> tuple[int, int]:
    """The number of slots that a composition takes, and the number of terms in each of them, summed over all."""
    masks = {mask for _, mask in _masks(composition)} - {0}
    return len(masks), sum(mask.bit_count() for mask in masks)


def _masks(composition: Composition) -> list[tuple[float, int]]:
    """The phases as (start, mask): bit i of the mask is set where term i acts.

    Terms are switched on and off at the ends of their scopes, so that the time grows with the terms, not with phases
    times terms: a client may send hundreds of each, which are counted before they are refused.
    """
    switched: dict[float, int] = {-math.inf: 0}  # by position: the terms that begin or end there
    for index, term in enumerate(composition.terms):
        if not acting(term):
            continue
        if term.scope is None:
            switched[-math.inf] ^= 1 << index
            continue
        for position in term.scope.span(PROMPT_LENGTH):
            at = _relative(position)
            switched[at] = switched.get(at, 0) ^ (1 << index)
    switched.pop(math.inf, None)
    masks, mask = [(-math.inf, switched[-math.inf])], switched[-math.inf]
    for start in sorted(switched)[1:]:
        if switched[start]:
            mask ^= switched[start]
            masks.append((start, mask))
    return masks


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(index for index, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")


def edges(ordered: Sequence[Phase], prompt_length: int) -> list[int]:
    """The first position of each phase in a sequence whose prompt has `prompt_length` tokens."""
    return [0 if phase.start == -math.inf else int(prompt_length + phase.start) for phase in ordered]


def counts(composition: Composition, prompt_length: int, end: int) -> list[tuple[int, int]]:
    """For each term, the number of prompt and response tokens it acted on, when positions [0, end) were computed."""
    by_scope = {scope: _count(scope, prompt_length, end) for scope in {term.scope for term in composition.terms}}
    return [by_scope[term.scope] if acting(term) else (0, 0) for term in composition.terms]


def _count(scope: Scope | None, prompt_length: int, end: int) -> tuple[int, int]:
    start, stop = scope.span(prompt_length) if scope else (0, math.inf)
    high = min(end, stop)
    return int(max(0, min(high, prompt_length) - start)), int(max(0, high - max(start, prompt_length)))


def _relative(position: float) -> float:
    """A position after PROMPT_LENGTH prompt tokens, counted from the prompt's end; -inf inside the prompt."""
    return position if math.isinf(position) else (-math.inf if position < PROMPT_LENGTH else position - PROMPT_LENGTH)
