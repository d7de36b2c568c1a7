"""The rows of a composition: equal to an obvious loop over slots, layers and terms bit for bit, and to the formula."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from fakes import changed
from hypothesis import given, settings
from torch import Tensor

from steer.serving.engine.bounds import directions_needed
from steer.serving.engine.phases import phases
from steer.serving.engine.worker import blocks
from steer.serving.engine.worker.rows import Rows, Stack, rows_of
from steer.serving.engine.worker.slots import SlotTable
from vectors.expression import Composition, Scope, Term, parse
from vectors.steering import SteeringVector

LAYERS, HIDDEN, DIRECTIONS = 3, 8, 3
CPU = torch.device("cpu")


def _vectors() -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: {i: torch.randn(HIDDEN, generator=generator) for i in range(LAYERS)}
        for name in ("warm", "formal", "calm")
    }
    drawn["none"] = {0: torch.zeros(HIDDEN), 1: torch.ones(HIDDEN), 2: torch.zeros(HIDDEN)}
    drawn["late"] = {2: torch.randn(HIDDEN, generator=generator)}
    acting = {"formal": [0, 2]}
    return {name: SteeringVector(layers, {"apply": acting.get(name)}) for name, layers in drawn.items()}


VECTORS = _vectors()
STACKS = {name: Stack(vector) for name, vector in VECTORS.items()}


def rows(composition: Composition, layers: range | list[int] = range(LAYERS), directions: int = DIRECTIONS) -> Rows:
    sets = list(dict.fromkeys(phase.terms for phase in phases(composition) if phase.terms))
    return rows_of(composition, sets, STACKS, layers, HIDDEN, directions, CPU)


def slow_rows(composition: Composition, layers: range | list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The obvious reference: one slot, one layer, one vector at a time. Shapes as in Rows."""
    sets = list(dict.fromkeys(phase.terms for phase in phases(composition) if phase.terms))
    added = torch.zeros(len(sets), len(layers), HIDDEN)
    units = torch.zeros(len(layers), DIRECTIONS, HIDDEN)
    factors = torch.zeros(len(layers), DIRECTIONS, len(sets), 2)
    in_any = sorted({i for terms in sets for i in terms})
    for i, layer in enumerate(layers):
        numbers: dict[str, int] = {}  # of the directions at this layer
        for t in in_any:
            term = composition.terms[t]
            vector = VECTORS[term.name]
            acts = layer in (term.layers if term.layers is not None else vector.apply)
            if term.operation == "add" or not acts or not bool(vector.layers[layer].any()):
                continue
            k = numbers.setdefault(term.name, len(numbers))
            units[i, k] = (vector.layers[layer].double() / vector.layers[layer].double().norm()).float()
        for p, terms in enumerate(sets):
            levels, gains = dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0.0)
            strengths: dict[str, float] = {}
            for t in in_any:
                term = composition.terms[t]
                acts = layer in (term.layers if term.layers is not None else VECTORS[term.name].apply)
                if term.operation == "add" and VECTORS[term.name].layers.keys() & {layer}:
                    strengths.setdefault(term.name, 0.0)
                if t not in terms or not acts:
                    continue
                if term.operation == "add":
                    strengths[term.name] += term.value
                elif term.name in numbers:
                    length = float(VECTORS[term.name].layers[layer].double().norm())
                    gains[term.name] -= term.value if term.operation == "ablate" else 1.0
                    levels[term.name] += term.value * length if term.operation == "clamp" else 0.0
            for name, strength in strengths.items():
                added[p, i] = added[p, i] + VECTORS[name].layers[layer] * torch.tensor(strength)
            for name, k in numbers.items():
                factors[i, k, p] = torch.tensor([levels[name], gains[name]])
    return added, units, factors


def terms() -> st.SearchStrategy[Term]:
    def made(operation: str, name: str, value: float, layers: tuple[int, ...] | None, scope: Scope | None) -> Term:
        return Term(operation, name, value, (2,) if name == "late" and layers is not None else layers, scope)

    scopes = st.one_of(
        st.none(),
        st.sampled_from([Scope("prompt"), Scope("response")]),
        st.builds(Scope, st.sampled_from(["first", "after"]), st.integers(0, 3)),
    )
    layers = st.one_of(st.none(), st.sampled_from([(0,), (1, 2), (0, 1, 2)]))
    values = st.sampled_from([0.0, 1.0, -0.4, 1 / 3, 2.7, 1e20])
    return st.builds(
        made, st.sampled_from(["add", "ablate", "clamp"]), st.sampled_from(sorted(VECTORS)), values, layers, scopes
    )


@given(st.lists(terms(), min_size=1, max_size=8), st.sampled_from([range(LAYERS), [1, 2], [0], [2]]))
@settings(max_examples=300, deadline=None)
def test_rows_equal_those_of_a_loop_bit_for_bit(listed: list[Term], layers: range | list[int]) -> None:
    composition = Composition(tuple(listed))
    if directions_needed(composition, VECTORS) > DIRECTIONS:
        with_all = range(LAYERS)
        if layers == with_all and directions_of(composition) > DIRECTIONS:
            with pytest.raises(ValueError, match="needs more than 3 directions"):
                rows(composition)
        return
    found, (added, units, factors) = rows(composition, layers), slow_rows(composition, layers)
    assert torch.equal(found.added, added)
    if found.units is None or found.factors is None:
        assert not units.any()
    else:
        assert torch.equal(found.units, units)
        assert torch.equal(found.factors, factors)


def directions_of(composition: Composition) -> int:
    """The directions that some layer really takes: zero vectors have none."""
    names = [{t.name for t in composition.terms if t.operation != "add" and takes(t, layer)} for layer in range(LAYERS)]
    return max(map(len, names))


def takes(term: Term, layer: int) -> bool:
    vector = VECTORS[term.name]
    acts = term.operation == "clamp" or term.value != 0
    nothing = term.scope is not None and term.scope.span(9)[0] >= term.scope.span(9)[1]
    return acts and not nothing and layer in vector.acting(term.layers) and bool(vector.layers[layer].any())


@pytest.mark.parametrize(
    "text",
    [
        "2*warm",
        "ablate(warm)",
        "ablate(formal[1], 0.3)",
        "clamp(calm, -2)",
        "1.2*warm - 0.4*formal[1] + ablate(calm) + clamp(formal, 1)",
        "ablate(warm) + clamp(warm, 2) + 0.3*warm + ablate(warm, 0.5)",
        "3*none + ablate(none) + clamp(none, 4)",
        "clamp(calm[2], 3) + ablate(warm) + ablate(none) + 2*none + late",
    ],
)
def test_a_row_does_what_the_language_says(text: str) -> None:
    composition = parse(text)
    table = SlotTable(range(LAYERS), 4, HIDDEN, DIRECTIONS, CPU)
    (slot,) = table.take(text, composition, phases(composition), STACKS)
    stream = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    slots = torch.full((5,), slot, dtype=torch.int32)
    for layer in range(LAYERS):
        change = blocks.change_of(stream, slots, table.added[layer], table.units[layer], table.factors[layer])
        assert torch.allclose(stream.double() + change, changed(stream, composition, layer, VECTORS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_steering_multiplies_layer_by_layer_never_overflows_and_plain_tokens_stay_as_they_are(
    dtype: torch.dtype,
) -> None:
    """An ablation by 1e11 at every layer of the deepest models, against a stream of float32 that would not hold it."""
    table = SlotTable([0], 4, HIDDEN, DIRECTIONS, CPU)
    text = "ablate(warm[0], 1e11) + clamp(calm[0], 1e4) + 100*formal[0]"
    (slot,) = table.take(text, parse(text), phases(parse(text)), STACKS)
    slots = torch.tensor([0, slot, 0, slot], dtype=torch.int32)
    stream = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    stream[0, 0], stream[2, 1] = 60_000, -40_000  # as large as plain tokens may be in float16
    plain = stream[[0, 2]].clone()
    for _ in range(200):
        change = blocks.change_of(stream, slots, table.added[0], table.units[0], table.factors[0])
        stream = (stream + change).to(dtype)
    assert torch.equal(stream[[0, 2]], plain)
    assert torch.isfinite(stream.float().square().sum(-1)).all()
    assert float(stream[[1, 3]].float().abs().max()) > 1e4


def test_a_worker_of_a_pipeline_holds_its_own_layers() -> None:
    whole, last = rows(parse("warm + ablate(calm)")), rows(parse("warm + ablate(calm)"), [2])
    assert torch.equal(last.added[:, 0], whole.added[:, 2])
    assert torch.equal(last.units[0], whole.units[2])  # type: ignore[index]
    assert not rows(parse("late"), [0, 1]).added.any()


def test_more_directions_than_the_table_has_are_refused_here_too() -> None:
    with pytest.raises(ValueError, match="layer 0 needs more than 1 directions"):
        rows(parse("ablate(warm) + ablate(calm)"), directions=1)


def test_a_table_is_written_as_a_loop_over_slots_would() -> None:
    """Phases of one composition, written in one copy for each tensor, into slots that others left."""
    table = SlotTable(range(LAYERS), 6, HIDDEN, DIRECTIONS, CPU)
    for i, text in enumerate(
        [
            "clamp(warm, 2)@prompt + ablate(calm)@response + formal",
            "warm@after:1 + calm",
            "ablate(calm) + warm@first:2 + clamp(formal[1], 3)@after:2",
            "2*late + calm@prompt + warm@first:3",
        ]
    ):
        composition = parse(text)
        found = table.take(str(i), composition, phases(composition), STACKS)
        table.release(str(i))
        added, units, factors = slow_rows(composition, range(LAYERS))
        sets = list(dict.fromkeys(phase.terms for phase in phases(composition) if phase.terms))
        for slot, phase in zip(found, phases(composition), strict=True):
            if not phase.terms:
                assert slot == 0
                continue
            p = sets.index(phase.terms)
            assert torch.equal(table.added[:, slot], added[p])
            assert torch.equal(table.factors[:, :, slot], factors[:, :, p])
            assert torch.equal(table.units[:, :, slot], units)
    assert not any(part[..., 0, :].any() for part in (table.added, table.units, table.factors))


def test_lengths_of_vectors_whose_squares_overflow_or_vanish_are_right() -> None:
    stack = Stack(SteeringVector({0: torch.full((4,), 1e30), 1: torch.full((4,), 1e-30)}))
    assert stack.lengths.tolist() == [pytest.approx(2e30), pytest.approx(2e-30)]
    assert torch.equal(stack.units, torch.full((2, 4), 0.5))


def test_lengths_are_finite_and_a_zero_direction_has_no_unit() -> None:
    stack = Stack(VECTORS["none"])
    assert stack.lengths.tolist() == [0, pytest.approx(math.sqrt(HIDDEN)), 0]
    assert not stack.units[0].any()
