"""Steering vectors merged by the methods of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merges import steering
from merges.recipes.recipe import Part, Recipe
from vectors.errors import ArtifactError
from vectors.steering import SteeringVector


def part(name: str, **options: Any) -> Part:
    return Part(name, Path(name).stem, options)


def test_steering_vectors_merge_by_the_same_methods() -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"base": {"digest": "sha256:x"}}
    a, b = (SteeringVector({i: torch.randn(40, generator=draw) for i in (3, 4)}, base) for _ in range(2))
    found = steering.merge(Recipe("ties", (part("a", density=0.5), part("b", density=0.5))), [a, b])
    for i in (3, 4):
        kept = [
            torch.where(
                v.layers[i].abs() >= v.layers[i].abs().sort(descending=True).values[19], v.layers[i], 0
            ).double()
            for v in (a, b)
        ]
        sign = (kept[0] + kept[1]).sign()
        agree = [(k * sign > 0) for k in kept]
        count = (agree[0].int() + agree[1].int()).clamp(min=1)
        assert torch.equal(found.layers[i], ((kept[0] * agree[0] + kept[1] * agree[1]) / count).float())
    summed = steering.merge(Recipe("task_arithmetic", (part("a", weight=2), part("b", weight=-1))), [a, b])
    torch.testing.assert_close(summed.layers[3], 2 * a.layers[3] - b.layers[3])
    assert summed.base["digest"] == "sha256:x"
    with pytest.raises(ArtifactError, match="different models"):
        steering.merge(
            Recipe("ties", (part("a"), part("c"))), [a, SteeringVector(b.layers, {"base": {"digest": "sha256:y"}})]
        )
