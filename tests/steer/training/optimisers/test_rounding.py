"""Weights in bfloat16: how each optimiser keeps steps that are smaller than their last place."""

from __future__ import annotations

import math

import pytest
import torch
from networks import NAMES, equal, gradients, network, one, train
from torch import nn

from steer.training import optimisers
from steer.training.optimisers import _optimiser, _rounding


def progress(rounding: str, lr: float, steps: int) -> float:
    """How far coherent steps of size `lr` move bfloat16 weights of size .02, as part of how far they should."""
    start = (0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0))).bfloat16()
    parameter = nn.Parameter(start.clone())
    optimiser = optimisers.create("adamw", [("w", parameter)], lr=lr, rounding=rounding)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)  # Adam's step of a constant gradient is the learning rate
        optimiser.step()
    return float((start.double() - parameter.detach().double()).mean() / (lr * steps))


def test_small_steps_are_lost_to_the_nearest_bfloat16_and_kept_otherwise() -> None:
    assert progress("nearest", 1e-5, 100) < 0.35
    # All have moved equally far, 8.2 last places for most: what is left of the last one is not seen.
    assert progress("exact", 1e-5, 100) == pytest.approx(1, abs=0.03)
    assert progress("stochastic", 1e-5, 100) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_exact_rounding_is_a_run_on_float32_masters(name: str) -> None:
    """The master of every step is that of a float32 optimiser which is given the same gradients."""
    narrow = one((12, 20), dtype=torch.bfloat16)
    wide = [(narrow[0][0], nn.Parameter(narrow[0][1].detach().float()))]
    first, second = (optimisers.create(name, named, lr=1e-4, weight_decay=0.01) for named in (narrow, wide))
    for gradient in gradients((12, 20), 25):
        narrow[0][1].grad = gradient.bfloat16()
        wide[0][1].grad = gradient.bfloat16().float()
        first.step()
        second.step()
    master = _rounding.widened(narrow[0][1].detach(), first.state[narrow[0][1]]["remainder"])
    assert torch.equal(master, wide[0][1].detach())
    assert (narrow[0][1].detach().float() - master).abs().max() <= master.abs().max() * 2**-8


def test_a_float32_number_is_its_bfloat16_and_the_remainder() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(1)).int()
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    rounded, remainder = _rounding.split(values)
    assert torch.equal(_rounding.widened(rounded, remainder), values)
    ordinary = values[(values.abs() > 1e-30) & (values.abs() < 1e30)]
    nearest = (ordinary.bfloat16().double() - ordinary.double()).abs()
    assert torch.equal((_rounding.split(ordinary)[0].double() - ordinary.double()).abs(), nearest)


def test_stochastic_rounding_is_right_on_average_and_repeats() -> None:
    value = torch.full((40_001,), 1.0 + 0.3 * 2**-7)
    value[1::2] *= -1
    rounded = _rounding.stochastic(value, torch.Generator().manual_seed(2))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7, -1.0, -1.0 - 2**-7}
    up = (rounded.abs() > 1).float()
    assert up.mean() == pytest.approx(0.3, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([up[:-1], up[1:]]))[0, 1])) < 0.02
    assert torch.equal(rounded, _rounding.stochastic(value, torch.Generator().manual_seed(2)))
    assert _rounding.stochastic(torch.tensor([math.inf, -math.inf, 0.0]), torch.Generator()).tolist() == [
        math.inf,
        -math.inf,
        0.0,
    ]
    assert _rounding.stochastic(torch.tensor([math.nan]), torch.Generator()).isnan().all()


def test_many_bfloat16_weights_are_moved_in_parts_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = network(dtype=torch.bfloat16), network(dtype=torch.bfloat16)
    train(whole, optimisers.create("adamw", whole.named_parameters(), lr=1e-3), range(5))
    monkeypatch.setattr(_optimiser, "BATCH", 100)
    train(parts, optimisers.create("adamw", parts.named_parameters(), lr=1e-3), range(5))
    assert equal(whole, parts)
