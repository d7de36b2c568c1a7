"""When a composition acts: scopes divide a sequence into phases, and within a phase the same terms act on every token.

A phase takes one slot, so a scope adds no work to a step. Positions count from the first token of the request's true
prompt, so they are the same under chunked prefill, preemption and prefix caching.

Conditions are gates: a phase with gated terms has a variant, and a slot, for each set of open gates, and the device
chooses. Gated terms act on the response only, whatever their scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vectors.expression import Composition, Condition, Scope, Term

PROMPT_LENGTH = 1 << 40  # longer than any prompt: a smaller position is in the prompt, any other in the response


class Phase(NamedTuple):
    """Terms that act together while all gates are open.

    They act from `start` tokens after the end of the prompt; -inf: from the first token.
    """

    start: float
    terms: tuple[int, ...]  # indices of terms in the composition


def acting(term: Term) -> bool:
    """Whether a term can change the residual stream: strength 0 can't, a clamp to 0 can; on no token nothing can."""
    nowhere = term.scope is not None and term.scope.kind == "first" and term.scope.count == 0
    return not nowhere and (term.operation == "clamp" or term.value != 0)


def phases(composition: Composition) -> tuple[Phase, ...]:
    """The phases of a composition in order; the last one is open-ended. A phase may have no terms."""
    return tuple(Phase(start, _bits(mask)) for start, mask in _masks(composition))


def gates(composition: Composition) -> tuple[Condition, ...]:
    """The conditions of the terms that can act, each once, in order: gate k is bit k of a set of open gates."""
    acting_terms = [term for term in composition.terms if acting(term)]
    return tuple(dict.fromkeys(condition for term in acting_terms for condition in term.conditions))


def opens(gate: Condition, value: float) -> bool:
    """Whether a gate is open at a value; both sides are rounded to float32, as on the device."""
    return bool(replace(gate, threshold=float(np.float32(gate.threshold))).holds(float(np.float32(value))))


def variants(composition: Composition, terms: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Which of some terms act, for each set of open gates, as a number: bit k is set where gate k is open."""
    numbers = {gate: k for k, gate in enumerate(gates(composition))}
    needs = {t: sum(1 << numbers[gate] for gate in set(composition.terms[t].conditions)) for t in terms}
    return tuple(tuple(t for t in terms if needs[t] & gates == needs[t]) for gates in range(1 << len(numbers)))


def gated_sets(composition: Composition) -> tuple[tuple[int, ...], ...]:
    """The sets of terms of the phases in which a gate can make a difference, each once, in order."""
    sets = dict.fromkeys(phase.terms for phase in phases(composition))
    return tuple(terms for terms in sets if any(composition.terms[t].conditions for t in terms))


def conditions_of(composition: Composition, terms: Sequence[int]) -> set[Condition]:
    """The conditions that some terms have, given by index."""
    return {condition for t in terms for condition in composition.terms[t].conditions}


def slots_needed(composition: Composition) -> int:
    """The number of slots that a composition takes: one for each set of terms that acts together."""
    return size(composition)[0]


def size(composition: Composition) -> tuple[int, int]:
    """The number of slots that a composition takes, and the number of terms in each of them, summed over all."""
    masks = {mask for _, mask in _masks(composition)}
    if gates(composition):
        sets = {each for mask in masks for each in variants(composition, _bits(mask))} - {()}
        return len(sets), sum(map(len, sets))
    return len(masks - {0}), sum(mask.bit_count() for mask in masks)


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
    """For each term, the number of prompt and response tokens it may act on, when positions [0, end) were computed."""
    by_scope = {scope: _count(scope, prompt_length, end) for scope in {term.scope for term in composition.terms}}
    return [by_scope[term.scope] if acting(term) else (0, 0) for term in composition.terms]


def gated_counts(composition: Composition, tokens: Sequence[Sequence[int]]) -> dict[int, int]:
    """For each gated term, by index, the number of tokens it acted on.

    `tokens[i][s]` is the number of tokens of the i-th of `gated_sets` on which the set of open gates was s.
    """
    counted = {t: 0 for t, term in enumerate(composition.terms) if term.conditions}
    for terms, numbers in zip(gated_sets(composition), tokens, strict=False):
        by_set = variants(composition, terms)
        for each, number in enumerate(numbers):
            for t in by_set[each % len(by_set)]:  # a composition with fewer gates ignores the bits of the others
                if t in counted:
                    counted[t] += int(number)
    return counted


def _count(scope: Scope | None, prompt_length: int, end: int) -> tuple[int, int]:
    start, stop = scope.span(prompt_length) if scope else (0, math.inf)
    high = min(end, stop)
    return int(max(0, min(high, prompt_length) - start)), int(max(0, high - max(start, prompt_length)))


def _relative(position: float) -> float:
    """A position after PROMPT_LENGTH prompt tokens, counted from the prompt's end; -inf inside the prompt."""
    return position if math.isinf(position) else (-math.inf if position < PROMPT_LENGTH else position - PROMPT_LENGTH)
