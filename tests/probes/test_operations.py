"""The operations in closed form: on vectors, and in a model in the written order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pico
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from probes.models import residual
from probes.operations import change_of
from probes.steered import steered
from vectors.errors import ExpressionError
from vectors.steering import SteeringVector

IDS = torch.tensor(pico.sequences(3, 6, 6, seed=3))
LAYER = 1
DEGREES = st.floats(-180, 180)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angle(h: Tensor, u: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos((h @ u / h.norm(dim=-1) / u.norm()).clamp(-1, 1)))


@settings(max_examples=50)
@given(st.integers(0, 10**6), DEGREES)
def test_a_rotation_keeps_the_norm_and_the_plane_and_changes_the_angle_by_its_degrees(seed: int, d: float) -> None:
    h, v = 3 * drawn(seed, 4, 6), drawn(seed + 1, 6)
    turned = h + change_of("rotate", d, v, h)
    assert torch.allclose(turned.norm(dim=-1), h.norm(dim=-1))
    # Towards the direction, and no further than to it; away, and no further than to its opposite.
    expected = (angle(h, v) - d).clamp(0, 180)
    assert torch.allclose(angle(turned, v), expected, rtol=0, atol=1e-4)
    plane = torch.stack([v / v.norm(), *torch.zeros(0)])
    for before, after in zip(h, turned, strict=True):
        basis = torch.linalg.qr(torch.stack([plane[0], before]).T).Q
        assert torch.allclose(basis @ (basis.T @ after), after)


def test_rotations_in_turn_are_the_rotation_by_their_sum() -> None:
    h, v = drawn(1, 5, 6), drawn(2, 6)
    once = h + change_of("rotate", 30.0, v, h)
    twice = once + change_of("rotate", -12.0, v, once)
    assert torch.allclose(twice, h + change_of("rotate", 18.0, v, h))
    assert torch.allclose(h + change_of("rotate", 180.0, v, h), h.norm(dim=-1, keepdim=True) * v / v.norm())
    assert torch.allclose(h + change_of("rotate", -180.0, v, h), -h.norm(dim=-1, keepdim=True) * v / v.norm())


@pytest.mark.parametrize("degrees", [-90.0, 40.0])
def test_a_stream_along_the_direction_or_zero_stays(degrees: float) -> None:
    v = drawn(3, 6)
    h = torch.stack([2 * v, -0.5 * v, 0 * v])
    for dtype in (torch.float64, torch.float32):
        found = change_of("rotate", degrees, v.to(dtype), h.to(dtype))
        assert torch.equal(found, torch.zeros_like(h.to(dtype)))


def test_a_share_has_that_share_of_each_norm_whatever_the_direction_s_length() -> None:
    h, v = drawn(4, 5, 6), drawn(5, 6)
    for scale in (0.01, 1.0, 70.0):
        change = change_of("share", -2.5, scale * v, h)
        assert torch.allclose(change, -0.025 * h.norm(dim=-1, keepdim=True) * v / v.norm())


def test_an_ablation_to_the_mean_leaves_the_mean_and_a_part_of_it_the_way_there() -> None:
    h, v, mean = drawn(6, 5, 6), drawn(7, 6), 1.75
    component = h @ v / (v @ v)
    for strength in (1.0, 0.4, -0.5):
        left = (h + change_of("mean_ablate", strength, v, h, mean)) @ v / (v @ v)
        assert torch.allclose(left, (1 - strength) * component + strength * mean)
    assert torch.allclose(change_of("mean_ablate", 1.0, v, h, mean), change_of("clamp", mean, v, h))
    assert torch.allclose(change_of("mean_ablate", 0.7, v, h, 0.0), change_of("ablate", 0.7, v, h))


@pytest.mark.parametrize("operation", ["add", "share", "ablate", "mean_ablate", "clamp", "rotate"])
def test_a_zero_direction_changes_nothing(operation: str) -> None:
    assert not change_of(operation, 2.0, torch.zeros(6), drawn(1, 3, 6).float(), 1.0).any()


VECTORS = {
    name: SteeringVector({LAYER: drawn(seed, pico.HIDDEN).float()}, {"measured": {str(LAYER): {"projection": 0.5}}})
    for seed, name in enumerate(("warm", "cold", "calm"))
}


def stream(model: Any, composition: str | None, **options: Any) -> Tensor:
    """The output of the steered block, [rows, tokens, hidden]."""
    seen: list[Tensor] = []
    hook = residual.blocks(model)[LAYER].register_forward_hook(
        lambda _m, _i, output: seen.append(residual.output_of(output).clone())
    )
    try:
        with torch.inference_mode():
            if composition is None:
                model(input_ids=IDS, use_cache=False)
            else:
                with steered(model, composition, vectors=VECTORS, **options):
                    model(input_ids=IDS, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def by_hand(h: Tensor, operation: str, value: float, name: str) -> Tensor:
    return change_of(operation, value, VECTORS[name].layers[LAYER], h, 0.5)


def test_a_rotation_turns_what_stands_before_it_and_what_stands_behind_reads_what_it_made(
    pico_model: Callable[..., Any],
) -> None:
    model = pico_model("llama")
    h = stream(model, None)
    before = h + by_hand(h, "add", 2.0, "warm") + by_hand(h, "share", 30.0, "cold")
    turned = before + by_hand(before, "rotate", 25.0, "cold")
    expected = turned + by_hand(turned, "ablate", 1.0, "warm") + by_hand(turned, "mean_ablate", 0.5, "calm")
    found = stream(model, "2*warm + cold%30 + rotate(cold, 25) + ablate(warm) + ablate(calm, 0.5, to=mean)")
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    other = stream(model, "rotate(cold, 25) + 2*warm + cold%30 + ablate(warm) + ablate(calm, 0.5, to=mean)")
    assert not torch.allclose(other, expected, rtol=0, atol=1e-2)
    again = turned + by_hand(turned, "rotate", -60.0, "calm")
    found = stream(model, "2*warm + cold%30 + rotate(cold, 25) + rotate(calm, -60)")
    assert torch.allclose(found, again, rtol=0, atol=1e-4)


def test_without_a_rotation_the_order_does_not_matter(pico_model: Callable[..., Any]) -> None:
    model = pico_model("llama")
    h = stream(model, None)
    expected = h + by_hand(h, "add", 2.0, "warm") + by_hand(h, "share", 30.0, "cold")
    expected += by_hand(h, "mean_ablate", 1.0, "warm")
    for text in ("2*warm + cold%30 + ablate(warm, to=mean)", "ablate(warm, to=mean) + cold%30 + 2*warm"):
        assert torch.allclose(stream(model, text), expected, rtol=0, atol=1e-4)


def test_a_rotation_is_a_step_only_for_the_tokens_that_it_acts_on(pico_model: Callable[..., Any]) -> None:
    model = pico_model("llama")
    found = stream(model, "2*warm + rotate(cold, 25)@response + ablate(warm)", prompt_length=3)
    plain = stream(model, "2*warm + ablate(warm)")
    turned = stream(model, "2*warm + rotate(cold, 25) + ablate(warm)")
    assert torch.equal(found[:, :3], plain[:, :3])
    assert torch.allclose(found[:, 3:], turned[:, 3:], rtol=0, atol=1e-5)
    rows = stream(model, ["2*warm", "2*warm + rotate(cold, 25) + ablate(warm)", "ablate(warm)"])  # type: ignore[arg-type]
    assert torch.allclose(rows[1], turned[1], rtol=0, atol=1e-5)
    assert torch.equal(rows[0], stream(model, "2*warm")[0])


def test_a_vector_without_a_measured_mean_is_refused_with_the_layers(pico_model: Callable[..., Any]) -> None:
    old = SteeringVector({1: torch.ones(pico.HIDDEN), 2: torch.ones(pico.HIDDEN)})
    with (
        pytest.raises(ExpressionError, match="records no mean projection at layer 1-2") as caught,
        steered(pico_model("llama"), "ablate(old, to=mean)", vectors={"old": old}),
    ):
        pass
    assert "extract again" in caught.value.hint
    assert math.isclose(VECTORS["warm"].mean_at(LAYER) or 0.0, 0.5)
