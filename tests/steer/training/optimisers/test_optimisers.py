"""Every optimiser: against torch's own, what it learns, and the settings and parameters that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import NAMES, equal, loss_of, network, one, train, weights

from steer.training import optimisers
from steer.training.optimisers import _optimiser
from vectors.errors import UsageError


def test_adamw_is_torchs_own_bit_for_bit() -> None:
    ours, theirs = network(), network()
    mine = optimisers.create("adamw", ours.named_parameters(), lr=1e-3, weight_decay=0.1)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    other = torch.optim.AdamW(
        [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1, fused=True
    )
    train(ours, mine, range(20))
    train(theirs, other, range(20))
    assert equal(ours, theirs)


def test_muon_is_torchs_own_with_adamw_for_the_rest() -> None:
    ours, theirs = network(), network()
    mine = optimisers.create("muon", ours.named_parameters(), lr=1e-3)
    between, rest = _optimiser.matrices(theirs.named_parameters())
    assert [name for name, _ in between] == ["up.weight", "square.weight", "down.weight"]
    muon = torch.optim.Muon([p for _, p in between], lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for _, p in rest], lr=1e-3, weight_decay=0.0, fused=True)
    train(ours, mine, range(20))
    for step in range(20):
        theirs.zero_grad()
        loss_of(theirs, step).backward()
        muon.step()
        adamw.step()
    assert equal(ours, theirs)


def test_norms_and_biases_are_not_decayed() -> None:
    for name in NAMES:
        model = network()
        before = weights(model)
        optimiser = optimisers.create(name, model.named_parameters(), lr=0.1, weight_decay=0.5)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        for key, after in weights(model).items():
            factor = 1.0 if after.ndim < 2 else 0.95
            torch.testing.assert_close(after, before[key] * factor)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_learns_as_adamw_does(name: str) -> None:
    losses = {}
    for contestant in {name, "adamw"}:
        model = network()
        optimiser = optimisers.create(contestant, model.named_parameters(), lr=3e-3)
        train(model, optimiser, range(250))
        losses[contestant] = sum(loss_of(model, 10_000 + i).item() for i in range(8)) / 8
    assert losses["adamw"] < 0.1  # log 20 = 3.0 at first
    assert losses[name] < 0.1


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        optimisers.create("apollo", [], lr=-1, weight_decay=math.nan, rnak=3, beta1=2, rounding="up")
    assert len(caught.value.problems) == 5
    assert "did you mean rank" in str(caught.value)


def test_an_unknown_optimiser_is_guessed() -> None:
    with pytest.raises(UsageError, match="no optimiser 'appolo'") as caught:
        optimisers.create("appolo", [], lr=1)
    assert "apollo" in caught.value.hint


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="no parameter that needs a gradient"):
        optimisers.create("adamw", network().requires_grad_(False).named_parameters(), lr=1)
    with pytest.raises(UsageError, match="w is in float16"):
        optimisers.create("adamw", one((3, 3), dtype=torch.float16), lr=1)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_and_parameters_without_gradient_stay(name: str) -> None:
    model: Any = network()
    model["square"].weight.requires_grad_(False)
    optimiser = optimisers.create(name, model.named_parameters(), lr=0.1)
    before = weights(model)
    loss_of(model, 0).backward()
    model["up"].weight.grad = None
    optimiser.step()
    after = weights(model)
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert still == {"square.weight", "up.weight"}
