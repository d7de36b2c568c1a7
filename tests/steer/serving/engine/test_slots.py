"""The slot table against the formula, and slots that are given away and come back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fakes import changed
from torch import Tensor, nn

from steer.serving.engine.bounds import directions_needed
from steer.serving.engine.phases import phases
from steer.serving.engine.proving.forms import Form, Proved
from steer.serving.engine.worker import blocks
from steer.serving.engine.worker.rows import Stack
from steer.serving.engine.worker.slots import SlotTable
from vectors.expression import parse
from vectors.steering import SteeringVector

LAYERS, HIDDEN = 3, 8
CPU = torch.device("cpu")


@pytest.fixture
def vectors() -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(1)
    made = {
        name: {i: torch.randn(HIDDEN, generator=generator) for i in range(LAYERS)}
        for name in ("warm", "formal", "calm")
    }
    made["none"] = {0: torch.zeros(HIDDEN)}
    return {name: SteeringVector(layers, {"apply": [0, 2]} if len(layers) > 1 else {}) for name, layers in made.items()}


@pytest.mark.parametrize(
    ("text", "directions"),
    [
        ("warm", 0),
        ("ablate(warm, 0)", 0),
        ("ablate(warm) + clamp(warm, 2)", 1),
        ("ablate(warm) + ablate(calm)", 2),
        ("ablate(warm[0]) + ablate(calm[1])", 1),
        ("ablate(warm)@prompt + ablate(calm)@response", 2),
    ],
)
def test_directions_that_a_composition_needs(text: str, directions: int, vectors: dict[str, SteeringVector]) -> None:
    assert directions_needed(parse(text), vectors) == directions


def take(table: SlotTable, text: str, vectors: dict[str, SteeringVector]) -> list[int]:
    composition = parse(text)
    return table.take(text, composition, phases(composition), {name: Stack(v) for name, v in vectors.items()})


def test_row_zero_stays_zero_and_equal_compositions_share_rows(vectors: dict[str, SteeringVector]) -> None:
    table = SlotTable(range(LAYERS), 4, HIDDEN, 1, CPU)
    first, second = take(table, "warm@response", vectors), take(table, "warm@response", vectors)
    assert first == second
    assert first[0] == 0, "nothing acts on the prompt"
    assert not any(part[..., 0, :].any() for part in (table.added, table.units, table.factors))
    assert torch.equal(table.added[2, first[1]], vectors["warm"].layers[2])
    assert not table.added[1].any(), "layer 1 does not act"


def test_idle_rows_are_kept_until_another_needs_the_room_the_longest_idle_first(
    vectors: dict[str, SteeringVector],
) -> None:
    table = SlotTable(range(LAYERS), 2, HIDDEN, 1, CPU)
    kept = list(take(table, "warm", vectors))
    take(table, "ablate(calm)", vectors)
    for key in ("warm", "ablate(calm)"):
        table.release(key)
    assert take(table, "warm", vectors) == kept, "it is still there"
    replaced = take(table, "2*formal", vectors)
    assert "ablate(calm)" not in table.choices
    assert torch.equal(table.added[0, replaced[0]], 2 * vectors["formal"].layers[0])
    assert not table.units[:, :, replaced[0]].any(), "nothing of the former composition is left"
    assert not table.factors[:, :, replaced[0]].any()


def test_rows_in_use_are_never_taken(vectors: dict[str, SteeringVector]) -> None:
    table = SlotTable(range(LAYERS), 1, HIDDEN, 1, CPU)
    take(table, "warm", vectors)
    with pytest.raises(RuntimeError, match="all 1 slots are held"):
        take(table, "formal", vectors)


class Halves(nn.Module):
    """A block that returns what vLLM's do: its output and the residual, to be added."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, positions: Any, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(hidden), residual + hidden


def installed(block: nn.Module, form: Form, table: SlotTable, slots: Tensor) -> dict[int, nn.Module]:
    """Blocks of this class at every layer of a table, steered."""
    blocks_by_layer = {layer: copy.deepcopy(block) for layer in table.layers}
    blocks.install({layer: Proved(each, form) for layer, each in blocks_by_layer.items()}, table, slots)
    return blocks_by_layer


def test_a_block_steers_the_sum_of_its_halves_and_leaves_plain_tokens_as_they_are(
    vectors: dict[str, SteeringVector],
) -> None:
    torch.manual_seed(0)
    block = Halves()
    hidden, residual = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    before = block(None, hidden, residual)
    table = SlotTable(range(LAYERS), 3, HIDDEN, 2, CPU)
    slot = take(table, "2*warm + ablate(calm) + clamp(formal, 1)", vectors)[0]
    slots = torch.tensor([0, slot, 0, slot, 0, 0], dtype=torch.int32)
    steered = installed(block, Form((0, 1)), table, slots)[2]
    after = steered(None, hidden, residual)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0][[0, 2]], before[0][[0, 2]]), "to the bit"
    expected = changed(sum(before), parse("2*warm + ablate(calm) + clamp(formal, 1)"), 2, vectors)
    assert torch.allclose(sum(after).double()[[1, 3]], expected[[1, 3]], atol=1e-5)
    assert "steer_added" not in steered.state_dict()


class Returns(nn.Module):
    """A block that returns what it is given, doubled, in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, hidden: Tensor) -> Any:
        stream = hidden * 2
        tuples = {"first": (stream, None), "second": (hidden, stream)}
        return {"whole": stream, "batched": stream[None], **tuples}[self.form]


@pytest.mark.parametrize(
    ("name", "form", "stream"),
    [
        ("whole", Form(None), lambda output: output),
        ("batched", Form(None, batched=True), lambda output: output[0]),
        ("first", Form((0,)), lambda output: output[0]),
        ("second", Form((1,)), lambda output: output[1]),
    ],
)
def test_a_block_is_steered_where_its_output_holds_the_stream(
    name: str, form: Form, stream: Any, vectors: dict[str, SteeringVector]
) -> None:
    table = SlotTable(range(LAYERS), 1, HIDDEN, 0, CPU)
    slot = take(table, "warm", vectors)[0]
    steered = installed(Returns(name), form, table, torch.full((4,), slot, dtype=torch.int32))[0]
    hidden = torch.randn(4, HIDDEN)
    assert torch.allclose(stream(steered(hidden)), hidden * 2 + vectors["warm"].layers[0])
    assert not isinstance(Returns(name)(hidden), tuple) or len(steered(hidden)) == 2
