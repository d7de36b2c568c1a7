"""The limits of one composition: its phases, terms and projections, and the size of what it adds.

All are checked in the front end, before the engine receives a request, in time that grows with the terms.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from probes.models.markers import WHAT, Markers, problems_of_sections
from steer.serving.engine.phases import acting, gated_sets, size
from steer.serving.settings import MOST_GATES, MOST_PHASES, MOST_STEPS, Settings
from vectors import fit
from vectors.expression import Composition, Condition, terms_in
from vectors.probe import Probe, reading_of
from vectors.registry.layers import spans
from vectors.steering import SteeringVector

TERMS = 16  # for each phase that the settings allow: the terms of a composition, counted in every phase they act in
GATED_PHASES = 8  # most phases of one composition in which a gate makes a difference; their tokens are counted apart
LARGEST = 3e38  # about the largest finite float32
# The most that steering adds to a value of the residual stream at one layer, and over all layers in length. Squares of
# sums of it are far below the largest float32, so every norm of the model stays finite, and so do keys and values.
# Otherwise NaN or inf would stay in blocks of the KV cache that are later given to other requests.
LONGEST = 1e12


def problems_of_text(text: str, settings: Settings) -> list[str]:
    """Why a text is not worth parsing: it has more terms than any composition may have."""
    allowed = TERMS * settings.phases
    if 1 + text.count("+") + text.count("-") <= allowed:
        return []
    count = terms_in(text)
    return [_too_much(f"{count} terms", math.ceil(count / TERMS), settings)] if count > allowed else []


def problems_of(
    composition: Composition, vectors: Mapping[str, SteeringVector], settings: Settings, dtype: torch.dtype
) -> list[str]:
    """Why a server with these settings, and a model of this dtype, can't apply a composition; empty when it can.

    `vectors` holds every vector of the composition.
    """
    reasons = _problems_of_size(composition, settings)
    if reasons:
        return reasons
    excerpt = str(composition) if len(str(composition)) <= 80 else f"{str(composition)[:77]}..."
    value, coordinate, length = _largest(composition, vectors)
    if not value < LARGEST:
        reasons.append(f"{excerpt} is too large for float32: it adds {value:.3g}")
    elif not coordinate < min(LARGEST, torch.finfo(dtype).max):
        reasons.append(f"{excerpt} is too large for {str(dtype).removeprefix('torch.')}: it adds {coordinate:.3g}")
    elif not length < LONGEST:
        reasons.append(
            f"{excerpt} is too large: it adds a length of {length:.3g} over all layers; beyond {LONGEST:.0e} the model "
            "would overflow"
        )
    directions = directions_needed(composition, vectors)
    if directions > settings.directions:
        reasons.append(
            f"{excerpt} projects along {directions} directions at one layer; the server was started with "
            f"{settings.directions}: --steer-directions {directions}"
        )
    steps = steps_needed(composition, vectors)
    if steps > settings.steps:
        what = composition.terms[composition.steps[0]]
        started = f"with {settings.steps} steps" if settings.steps else "without steps"
        reasons.append(
            f"{excerpt} needs {steps} steps at one layer, from {what} on; the server was started {started}: "
            + (f"--steer-steps {steps}" if steps <= MOST_STEPS else f"at most --steer-steps {MOST_STEPS}")
        )
    return reasons


def problems_of_conditions(
    composition: Composition,
    sources: Mapping[str, SteeringVector | Probe],
    settings: Settings,
    markers: Markers | None = None,
) -> list[str]:
    """Why a server with these settings can't decide the conditions of a composition; empty when it can.

    `sources` are the vectors and probes by name, `markers` those of the model's sections. It comes before whatever
    looks at each set of open gates.
    """
    conditions = composition.conditions
    if not conditions:
        return []
    if settings.gates == 0:
        return [f"the expression has the condition {conditions[0]}; the server was started without: --steer-gates 1"]
    if len(conditions) > settings.gates:
        needed = len(conditions)
        most = f"--steer-gates {needed}" if needed <= MOST_GATES else f"at most --steer-gates {MOST_GATES}"
        return [f"the expression has {needed} conditions; the server was started with {settings.gates} gates: {most}"]
    vectors = {name: each for name, each in sources.items() if isinstance(each, SteeringVector)}
    reasons = fit.problems_of_conditions(composition, vectors, sources) + _problems_of_sections(conditions, markers)
    phases = len(gated_sets(composition))
    if phases > GATED_PHASES:
        reasons.append(f"the terms with conditions act in {phases} phases, at most {GATED_PHASES} are possible")
    allowed = settings.gate_layers
    if reasons or allowed is None:
        return reasons
    for condition in (each for each in conditions if not each.is_section):
        layer = reading_of(sources[condition.name], condition.layer)[0]
        if layer not in allowed:
            more = spans(sorted({*allowed, layer}))
            reasons.append(
                f"{condition} reads layer {layer}; the server was started to read {spans(allowed) or 'none'}: "
                f"--steer-gate-layers {more}"
            )
    return reasons


def _problems_of_sections(conditions: Sequence[Condition], markers: Markers | None) -> list[str]:
    sections = [each for each in conditions if each.is_section]
    if sections and markers is None:
        return [
            f"{sections[0]} is decided by tokens, which a server with --skip-tokenizer-init or --enable-prompt-embeds "
            "can't tell: start it without"
        ]
    what = {problem: WHAT[each.kind] for each in sections for problem in problems_of_sections([each], markers)}
    return [f"{problem}: --steer-markers {kind}=BEGIN,END gives others" for problem, kind in what.items()]


def require_applicable(
    composition: Composition, vectors: Mapping[str, SteeringVector], directions: int, steps: int = 0
) -> None:
    """The check that a worker repeats before it writes into the slot table. Raises ValueError.

    All layers are checked, also those of other workers, so that every worker refuses the same.
    """
    value, _, length = _largest(composition, vectors)
    if not (value < LARGEST and length < LONGEST):
        raise ValueError(f"the composition is too large: it adds a length of {length:.3g}")
    needed = directions_needed(composition, vectors)
    if needed > directions:
        raise ValueError(f"the composition needs {needed} directions at one layer, the table has {directions}")
    if (needed := steps_needed(composition, vectors)) > steps:
        raise ValueError(f"the composition needs {needed} steps at one layer, the table has {steps}")
    if meanless := fit.problems_of_means(composition, vectors):
        raise ValueError("; ".join(meanless))


def steps_needed(composition: Composition, vectors: Mapping[str, SteeringVector]) -> int:
    """The most steps that any layer needs; an upper bound, since terms may act in different phases."""
    counts: dict[int, int] = {}
    for term in (composition.terms[index] for index in composition.steps):
        for layer in vectors[term.name].acting(term.layers) if acting(term) else ():
            counts[layer] = counts.get(layer, 0) + 1
    return max(counts.values(), default=0)


def directions_needed(composition: Composition, vectors: Mapping[str, SteeringVector]) -> int:
    """The most directions that any layer needs; an upper bound, since terms may act in different phases."""
    projected: dict[int, set[str]] = {}
    steps = set(composition.steps)
    summed = [term for index, term in enumerate(composition.terms) if index not in steps and acting(term)]
    for name, layers in {(term.name, term.layers) for term in summed if term.operation != "add"}:
        for layer in vectors[name].acting(layers):
            projected.setdefault(layer, set()).add(name)
    return max(map(len, projected.values()), default=0)


def _problems_of_size(composition: Composition, settings: Settings) -> list[str]:
    slots, terms = size(composition)
    terms = max(terms, len(composition.terms))  # those that do nothing (0*warm) are in no phase, but they are read
    if slots > settings.phases or terms > TERMS * settings.phases:
        several = f"{slots} phases and in all of them {terms} terms" if slots > 1 else f"{terms} terms"
        return [_too_much(several, max(slots, math.ceil(terms / TERMS)), settings)]
    if slots > settings.rows:
        return [
            f"the expression needs {slots} slots, one per phase; the server was started with {settings.rows}: "
            f"--steer-rows {slots}"
        ]
    return []


def _too_much(what: str, phases: int, settings: Settings) -> str:
    """The problem of an expression that needs a server with `phases`."""
    return (
        f"the expression has {what}; the server was started with {settings.phases} phases, each with {TERMS} terms: "
        + (f"--steer-phases {phases}" if phases <= MOST_PHASES else f"at most --steer-phases {MOST_PHASES}")
    )


class _Size(NamedTuple):
    """Of a vector: the length of its longest direction, its largest coordinate, and the sum of all lengths."""

    longest: float
    largest: float
    total: float


_SIZES: weakref.WeakKeyDictionary[SteeringVector, _Size] = weakref.WeakKeyDictionary()


def measure(vector: SteeringVector) -> None:
    """Compute the sizes of a vector's directions ahead, so that no request waits for it."""
    _size(vector)


def _size(vector: SteeringVector) -> _Size:
    size = _SIZES.get(vector)
    if size is None:
        lengths = [float(direction.double().norm()) for direction in vector.layers.values()]
        largest = max(float(direction.abs().max()) for direction in vector.layers.values())
        size = _SIZES[vector] = _Size(max(lengths), largest, sum(lengths))
    return size


def _largest(composition: Composition, vectors: Mapping[str, SteeringVector]) -> tuple[float, float, float]:
    """Upper bounds on what a composition adds: to a value of the slot table, to a coordinate of the residual stream,
    and to the stream's length over all layers. An ablation and a share depend on the stream, so they count with their
    strength alone, and a rotation, which adds no length, not at all.
    """
    value = coordinate = length = 0.0
    for term in composition.terms:
        strength = abs(term.value)
        if term.operation == "rotate":
            continue
        size = _Size(1.0, 0.0, 1.0) if term.operation in ("ablate", "share") else _size(vectors[term.name])
        if term.operation == "mean_ablate":
            means = [vectors[term.name].mean_at(layer) or 0.0 for layer in vectors[term.name].layers]
            strength *= max(1.0, *map(abs, means))
        value += (
            strength * max(1.0, size.longest) if term.operation in ("clamp", "mean_ablate") else strength * size.longest
        )
        coordinate += strength * size.largest
        length += strength * size.total
    return value, coordinate, length
