"""Recurrent states: what steering itself does to them is a movement of 1 along its direction."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pico
import pytest
import torch
from torch import nn

from probes.internals import recurrent
from probes.internals.recurrent import Where, movements, states
from probes.models.tokens import Tokens
from probes.steered import steered
from vectors.errors import ModelError
from vectors.steering import SteeringVector

CONTEXTS = [Tokens(ids, [len(ids) - 1]) for ids in pico.sequences(6, 4, 6)]
NAMES = pytest.mark.parametrize("name", ["lfm2", "qwen3-next"])


def vector(seed: int = 0, layer: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(pico.HIDDEN, generator=generator)}, {"apply": [layer]})


def after_steering(model: nn.Module, by: SteeringVector) -> Callable[[Tokens], dict[Where, torch.Tensor]]:
    return lambda context: states(model, context, lambda: steered(model, by))


@NAMES
def test_a_model_that_does_what_the_vector_does_has_moved_by_1(name: str) -> None:
    model = pico.build(name)
    every = movements(model, after_steering(model, vector() * 2.0), CONTEXTS, vector(), 2.0, 0)
    assert {each.layer for each in every} == {"lfm2": {2}, "qwen3-next": {1, 2}}[name]  # above the vector's layer 0
    for found in every:
        assert found.movement == pytest.approx(1.0, abs=1e-9)
        assert found.cosine == pytest.approx(1.0, abs=1e-9)
        assert found.low == pytest.approx(1.0, abs=1e-9)


def test_a_model_that_has_not_changed_has_not_moved() -> None:
    model = pico.build("lfm2")
    for found in movements(model, model, CONTEXTS, vector(), 1.0, 0):
        assert (found.movement, found.floor, found.size, found.p_adjusted) == (0.0, 0.0, 0.0, 1.0)


def test_a_small_step_along_the_vector_is_beyond_the_floor_and_one_along_another_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recurrent, "FEWEST", len(CONTEXTS))
    model = pico.build("lfm2")
    found = movements(model, after_steering(model, vector() * 0.1), CONTEXTS, vector(), 0.1, 0)
    assert all(each.beyond_floor for each in found)
    other = after_steering(model, vector(seed=7) * 0.1)
    assert not all(each.beyond_floor for each in movements(model, other, CONTEXTS, vector(), 0.1, 0))


def test_few_contexts_give_figures_and_no_verdict() -> None:
    model = pico.build("lfm2")
    for found in movements(model, after_steering(model, vector()), CONTEXTS, vector(), 1.0, 0):
        assert found.movement > found.floor
        assert found.beyond_floor is None


def test_the_states_of_one_context_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.build("lfm2")
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def counted(*args: object) -> dict[Where, torch.Tensor]:
        found = states(*args)  # type: ignore[arg-type]
        held.append(sum(each() is not None for each in alive))
        alive.extend(weakref.ref(each) for each in found.values())
        return found

    monkeypatch.setattr(recurrent, "states", counted)
    movements(model, model, CONTEXTS, vector(), 1.0, 0)
    passes = len(held) // len(CONTEXTS)
    assert max(held[passes:]) <= max(held[:passes])  # no more after any context than within the first


def test_a_model_without_recurrent_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no recurrent layers"):
        states(pico.build("llama"), CONTEXTS[0])


def test_a_vector_above_every_recurrent_layer_is_refused() -> None:
    model = pico.build("lfm2")
    with pytest.raises(ModelError, match="reaches no recurrent state"):
        movements(model, model, CONTEXTS, vector(layer=3), 1.0, 0)


def test_models_of_different_shapes_are_refused() -> None:
    other = pico.build("lfm2", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ModelError, match="states of different shapes"):
        movements(pico.build("lfm2"), other, CONTEXTS, vector(), 1.0, 0)
