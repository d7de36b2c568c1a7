"""A delta as a LoRA adapter: what it loses, and what it can't hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merges import api
from merges.api import diff
from merges.outputs import adapter as lora_out
from merges.recipes.recipe import Part, Recipe


def part(name: str, **options: Any) -> Part:
    return Part(name, Path(name).stem, options)


def test_to_lora_and_back_loses_the_tail_of_the_singular_values(here: Path) -> None:
    base = folders.weights(0, "F32")
    draw = torch.Generator().manual_seed(3)
    low = {
        n: t
        + (
            torch.randn(t.shape[0], 2, generator=draw) @ torch.randn(2, t.shape[1], generator=draw)
            if "proj" in n
            else 0
        )
        for n, t in sorted(base.items())
    }
    folders.write(here / "fbase", base)
    folders.write(here / "low", low)
    report = lora_out.from_models("fbase", "low", here / "lora", 2)
    assert report["left_out"] == []
    assert report["relative_error"] < 1e-6
    api.merge(Recipe("task_arithmetic", (part("lora"),), "fbase"), "again")
    for name, tensor in folders.read(here / "again").items():
        np.testing.assert_allclose(tensor, low[name], rtol=1e-5, atol=1e-5)
    report = lora_out.from_models("fbase", "low", here / "lora1", 1)
    d = {n: (low[n] - base[n]).double().numpy() for n in base}
    tails = sum((np.linalg.svd(v, compute_uv=False)[1:] ** 2).sum() for n, v in d.items() if "proj" in n)
    assert report["relative_error"] == pytest.approx((tails / sum((v**2).sum() for v in d.values())) ** 0.5, rel=1e-5)
    assert set(load_file(here / "lora1" / "adapter_model.safetensors")) == {
        f"base_model.model.{n.removesuffix('.weight')}.lora_{side}.weight" for n in base if "proj" in n for side in "AB"
    }


def test_a_merge_of_an_adapter_and_a_vector_becomes_an_adapter(here: Path) -> None:
    folders.adapter(here / "lora")
    diff("base", "a", "a.safetensors")
    report = lora_out.from_recipe(
        Recipe("task_arithmetic", (part("lora"), part("a.safetensors")), "base", as_="vector"), here / "both", 8
    )
    assert set(report["left_out"]) == {n for n in folders.read(here / "base") if "proj" not in n}
