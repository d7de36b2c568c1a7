"""Steps in the slot table: equal to the operations in the written order, whatever else the table holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import fakes
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from probes.operations import change_of
from steer.serving.engine import bounds
from steer.serving.engine.phases import phases
from steer.serving.engine.worker import blocks
from steer.serving.engine.worker.rows import Stack
from steer.serving.engine.worker.slots import SlotTable, table_bytes
from steer.serving.settings import Settings, check
from vectors.errors import ExpressionError
from vectors.expression import Composition, Scope, Term, parse
from vectors.steering import SteeringVector

LAYERS, HIDDEN, DIRECTIONS, STEPS = 3, 8, 3, 4
CPU = torch.device("cpu")
STREAM = 3 * torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))


def _vectors() -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: {i: torch.randn(HIDDEN, generator=generator) for i in range(LAYERS)} for name in ("warm", "calm", "odd")
    }
    drawn["odd"][1] = torch.zeros(HIDDEN)
    measured = {str(i): {"projection": 0.5 * i - 0.7} for i in range(LAYERS)}
    return {
        name: SteeringVector(each, {"measured": measured, **({"apply": [0, 2]} if name == "calm" else {})})
        for name, each in drawn.items()
    }


VECTORS = _vectors()
STACKS = {name: Stack(vector) for name, vector in VECTORS.items()}


def in_order(terms: Sequence[Term], layer: int) -> Tensor:
    """The stream after some terms, by the language's own words, in float64."""
    stream = STREAM.double()
    read, change = stream, torch.zeros_like(stream)
    for term in terms:
        vector = VECTORS[term.name]
        if layer not in vector.acting(term.layers) or (term.value == 0 and term.operation != "clamp"):
            continue
        if term.operation == "rotate":
            read = stream + change
        mean = vector.mean_at(layer) or 0.0
        change = change + change_of(term.operation, term.value, vector.layers[layer].double(), read, mean)
        if term.operation == "rotate":
            read = stream + change
    return stream + change


def in_table(table: SlotTable, slot: int, layer: int) -> Tensor:
    slots = torch.full((len(STREAM),), slot, dtype=torch.int32)
    tables = table.added[layer], table.units[layer], table.factors[layer]
    return STREAM + blocks.change_of(STREAM, slots, *tables, (table.step_units[layer], table.step_factors[layer]))


def terms() -> st.SearchStrategy[Term]:
    values = st.sampled_from([0.0, 1.0, -0.4, 2.7, 40.0, -150.0])
    scopes = st.sampled_from([None, Scope("prompt"), Scope("response"), Scope("first", 2), Scope("after", 1)])
    operations = st.sampled_from(["add", "share", "ablate", "mean_ablate", "clamp", "rotate"])
    layers = st.sampled_from([None, (0,), (1, 2)])
    return st.builds(Term, operations, st.sampled_from(sorted(VECTORS)), values, layers, scopes)


@given(st.lists(terms(), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_every_phase_does_what_its_terms_do_in_the_written_order(listed: list[Term]) -> None:
    composition = Composition(tuple(listed))
    if bounds.steps_needed(composition, VECTORS) > STEPS:
        return
    table = SlotTable(range(LAYERS), 8, HIDDEN, DIRECTIONS, CPU, STEPS)
    ordered = phases(composition)
    for phase, slot in zip(ordered, table.take("key", composition, ordered, STACKS), strict=True):
        for layer in range(LAYERS):
            expected = in_order([composition.terms[index] for index in phase.terms], layer)
            # Near the direction itself, what is beyond it is rounded, and turned away from it that counts in full.
            assert torch.allclose(in_table(table, slot, layer).double(), expected, rtol=1e-3, atol=2e-3)


def test_a_composition_leaves_no_steps_behind_in_its_slot() -> None:
    table = SlotTable(range(LAYERS), 1, HIDDEN, DIRECTIONS, CPU, STEPS)
    for text in ("rotate(warm, 30) + 2*calm", "warm", "calm%5", "ablate(warm, to=mean)"):
        composition = parse(text)
        (slot,) = table.take(text, composition, phases(composition), STACKS)
        table.release(text)
        for layer in range(LAYERS):
            assert torch.allclose(in_table(table, slot, layer).double(), in_order(composition.terms, layer), atol=1e-4)
        assert torch.equal(in_table(table, 0, 1), STREAM)


def test_without_steps_the_table_is_as_large_as_it_was() -> None:
    table = SlotTable(range(LAYERS), 4, HIDDEN, DIRECTIONS, CPU)
    assert table.step_units.numel() == table.step_factors.numel() == 0
    for steps in (0, 3):
        table = SlotTable(range(LAYERS), 4, HIDDEN, DIRECTIONS, CPU, steps)
        tensors = (table.added, table.units, table.factors, table.step_units, table.step_factors)
        assert sum(t.nbytes for t in tensors) == table_bytes(LAYERS, 4, HIDDEN, DIRECTIONS, steps)


def test_what_turns_at_every_layer_keeps_its_norm_and_shares_never_overflow() -> None:
    table = SlotTable([0], 2, HIDDEN, 0, CPU, 1)
    turning, growing = (
        table.take(text, parse(text), phases(parse(text)), STACKS)[0] for text in ("rotate(warm[0], 7)", "calm[0]%1e5")
    )
    slots = torch.tensor([0, turning, growing], dtype=torch.int32)
    stream = STREAM[:3].clone()
    for _ in range(100):
        tables = table.added[0], table.units[0], table.factors[0]
        stream = stream + blocks.change_of(stream, slots, *tables, (table.step_units[0], table.step_factors[0]))
    assert torch.equal(stream[0], STREAM[0])
    assert float(stream[1].norm()) == pytest.approx(float(STREAM[1].norm()), rel=1e-4)
    assert math.isclose(float(torch.cosine_similarity(stream[1], VECTORS["warm"].layers[0], 0)), 1.0, abs_tol=1e-4)
    assert bool(torch.isfinite(stream[2].square().sum()))


@pytest.mark.parametrize(
    ("expression", "steps", "reason"),
    [
        ("warm + rotate(calm, 20)", 0, "needs 1 steps at one layer, from rotate(calm, 20) on; the server was started "
         "without steps: --steer-steps 1"),
        ("rotate(warm, 20) + calm + formal%3", 2, "started with 2 steps: --steer-steps 3"),
        ("rotate(warm, 20)" + " + warm" * 16, 2, "at most --steer-steps 16"),
        ("ablate(warm, to=mean)", 4, "the vector warm records no mean projection at layer 0-3"),
    ],
)  # fmt: skip
def test_what_needs_more_steps_or_a_mean_is_refused_at_admission(expression: str, steps: int, reason: str) -> None:
    from steer.serving.engine.admission import Admission

    vectors = fakes.vectors()
    admission = Admission(Settings(vectors, phases=8, steps=steps), fakes.HIDDEN, fakes.LAYERS, None)
    with pytest.raises(ExpressionError) as caught:
        admission.resolve(expression)
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match=r"steps at one layer, the table has|records no mean"):
        bounds.require_applicable(parse(expression), vectors, 4, steps)


def test_a_worker_with_too_few_steps_refuses_and_writes_nothing() -> None:
    table = SlotTable(range(LAYERS), 2, HIDDEN, DIRECTIONS, CPU, 1)
    composition = parse("rotate(warm, 20) + warm")
    with pytest.raises(ValueError, match="more than 1 steps"):
        table.take("key", composition, phases(composition), STACKS)
    assert len(table.free) == 2


def test_the_steps_of_a_server_are_what_its_arms_need_unless_they_are_given(tmp_path) -> None:  # type: ignore[no-untyped-def]
    VECTORS["warm"].save(tmp_path / "warm.safetensors")
    arms = {"turned": "warm + rotate(warm, 20) + warm@response", "shared": "warm%2"}
    values = {"vectors": {"warm": "warm.safetensors"}, "arms": arms}
    assert check(values, tmp_path).steps == 2
    assert check({**values, "steps": 5}, tmp_path).graph()["steps"] == 5
    plain = check({**values, "arms": {"plain": "warm"}}, tmp_path)
    assert plain.steps == 0
    assert "steps" not in plain.graph()
