"""LoRA adapters as inputs: an adapter is a delta, and a bad one is refused with every problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch

from merges import api
from merges.inputs import low_rank
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe
from vectors.errors import ModelError


def part(name: str, **options: Any) -> Part:
    return Part(name, Path(name).stem, options)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 0.5),
        ({"fan_in_fan_out": True}, 3.0),  # as PEFT saved it for another layer; a Linear layer is never transposed
    ],
)
def test_an_adapter_is_a_delta(here: Path, config: dict[str, Any], scale: float) -> None:
    head = torch.randn(20, 8)
    tensors = folders.adapter(
        here / "lora",
        rank=4 if "rank_pattern" in config else 2,
        config=config,
        extra={"base_model.model.lm_head.modules_to_save.weight": head},
    )
    api.merge(Recipe("task_arithmetic", (part("lora", weight=0.5),), "base", dtype="float32"), "out")
    api.merge(Recipe("linear", (part("base+lora"),), dtype="float32"), "on")
    base, out, on = (folders.read(here / name) for name in ("base", "out", "on"))
    delta = scale * (
        tensors[f"base_model.model.{folders.ADAPTED}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{folders.ADAPTED}.lora_A.weight"].double()
    )
    for name, before in base.items():
        change = delta if name == f"{folders.ADAPTED}.weight" else torch.zeros(()).double()
        if name == "lm_head.weight":
            change = head.double() - before.double()
        np.testing.assert_allclose(out[name], before.double() + 0.5 * change, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(on[name], before.double() + change, rtol=1e-5, atol=1e-6)


def test_bad_adapters_are_refused_with_every_problem(here: Path) -> None:
    folders.adapter(
        here / "bad",
        config={"use_dora": True},
        extra={
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
            "base_model.model.nothing.weight": torch.ones(3),
        },
    )
    with pytest.raises(ModelError) as caught:
        api.merge(Recipe("task_arithmetic", (part("bad"),), "base"), "out")
    found = "\n".join(caught.value.problems)
    for sentence in (
        "uses DoRA",
        "only one factor of model.layers.0.mlp.up_proj",
        "nothing.weight, which matches no parameter",
    ):
        assert sentence in found


def test_factors_of_a_large_matrix_are_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "SMALL", 100)
    draw = np.random.default_rng(0)
    matrix = (draw.standard_normal((260, 40)) * 0.9 ** np.arange(40)) @ draw.standard_normal((40, 220))
    matrix += 0.01 * draw.standard_normal(matrix.shape)
    _, _, error = low_rank.factors(matrix, 8)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert error <= 1.01 * np.sqrt((values[8:] ** 2).sum() / (values**2).sum())


def test_an_adapter_that_was_trained_on_another_model_is_spoken_of(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merges.recipes.plan import plan
    from vectors import references

    monkeypatch.setattr(references, "resolve", lambda name: references.ModelSource(Path(name), f"org/{name}", "r"))
    for trained, notes in (
        ("org/base", []),
        ("org/other", ["lora names org/other as the model it was trained on; it is applied to org/base"]),
    ):
        folders.adapter(here / "lora", config={"base_model_name_or_path": trained})
        for made in (Recipe("task_arithmetic", (part("lora"),), "base"), Recipe("linear", (part("base+lora"),))):
            assert [note.replace("base+lora", "lora") for note in plan(made).notes] == notes
        (here / "lora").rename(here / trained.replace("/", "-"))


@pytest.mark.parametrize("alpha", [6.8e38, -1e31, 10**300])
def test_an_alpha_beyond_float32_is_refused(here: Path, alpha: float) -> None:
    folders.adapter(here / "lora", config={"lora_alpha": alpha})
    with pytest.raises(ModelError, match="lora_alpha"):
        plan(folders.recipe("lora", method="task_arithmetic"))
