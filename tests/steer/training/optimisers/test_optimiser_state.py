"""The state of optimisers: through checkpoints, in any order of the parameters, and its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from networks import NAMES, equal, network, saved, train
from torch import Tensor, nn

from steer.training import optimisers
from vectors.errors import ArtifactError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    rounding = "stochastic" if dtype == torch.bfloat16 and name == "apollo" else "exact"
    options: dict[str, Any] = {"rounding": rounding} | ({"rank": 5} if name == "apollo" else {})
    if name.startswith("apollo"):
        options["refresh"] = 20

    def built(model: nn.Module, seed: int = 4) -> torch.optim.Optimizer:
        return optimisers.create(name, model.named_parameters(), lr=1e-3, weight_decay=0.01, seed=seed, **options)

    whole = network(dtype=dtype)
    train(whole, built(whole), range(25))  # beyond the new projection at step 20

    first = network(dtype=dtype)
    optimiser = built(first)
    train(first, optimiser, range(18))
    checkpoint = saved(optimiser)
    second = network(seed=1, dtype=dtype)
    second.load_state_dict(first.state_dict())
    resumed = built(second, seed=99)  # the seed of the checkpoint counts
    resumed.load_state_dict(checkpoint)
    train(second, resumed, range(18, 25))
    assert equal(whole, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_parameters_changes_nothing(name: str) -> None:
    there, back = network(), network()
    first = optimisers.create(name, there.named_parameters(), lr=1e-3, **({"rank": 5} if name == "apollo" else {}))
    second = optimisers.create(
        name, reversed(list(back.named_parameters())), lr=1e-3, **({"rank": 5} if name == "apollo" else {})
    )
    train(there, first, range(10))
    train(back, second, range(10))
    assert equal(there, back)
    second.load_state_dict(saved(first))
    train(there, first, range(10, 20))
    train(back, second, range(10, 20))
    assert equal(there, back)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_of_transformers_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(1)
    rows = [{"input_ids": row, "labels": row} for row in pico.sequences(40, 12, 12)]

    def run(resume: str | None) -> nn.Module:
        model = pico.build("llama").requires_grad_(True).train()
        options = {"rank": 4, "refresh": 5} if name == "apollo" else {}
        optimiser = optimisers.create(name, model.named_parameters(), lr=1e-3, weight_decay=0.01, seed=1, **options)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            seed=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimiser, None))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(None)
    assert equal(whole, run(str(tmp_path / "checkpoint-4")))
    assert not equal(whole, pico.build("llama"))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_made_of_tensors_and_plain_values(name: str) -> None:
    model = network(dtype=torch.bfloat16)
    optimiser = optimisers.create(name, model.named_parameters(), lr=1e-3)
    train(model, optimiser, range(2))
    state = saved(optimiser)["state"]
    assert len(state) == len(list(model.parameters()))
    for kept in state.values():
        assert all(isinstance(value, Tensor | int | float) for value in kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_drive_all_groups(name: str) -> None:
    model = network()
    optimiser = optimisers.create(name, model.named_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    train(model, optimiser, range(1))
    scheduler.step()
    assert {group["lr"] for group in optimiser.param_groups} == {0.05}


def test_a_checkpoint_of_other_parameters_is_refused_before_anything_is_changed() -> None:
    model = network()
    optimiser = optimisers.create("adamw", model.named_parameters(), lr=1e-3)
    train(model, optimiser, range(2))
    before = saved(optimiser)
    other = nn.Linear(3, 3)
    with pytest.raises(ArtifactError, match="lacks") as caught:
        optimiser.load_state_dict(optimisers.create("adamw", other.named_parameters(), lr=1).state_dict())
    assert "another run" in caught.value.hint
    with pytest.raises(ArtifactError, match="no group 'adamw'"):
        optimiser.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    after = saved(optimiser)
    assert before["param_groups"] == after["param_groups"]
    assert torch.equal(before["state"][0]["exp_avg"], after["state"][0]["exp_avg"])


def test_apollo_keeps_less_than_a_tenth_of_what_adamw_keeps_on_the_bundled_model() -> None:
    # One block of smollm2: q, k, v, o, gate, up and down; all thirty are alike.
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    sizes = {}
    for name in ("adamw", "apollo", "apollo_mini"):
        named = [(f"{i}.weight", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimiser = optimisers.create(name, named, lr=1e-5, **({"rank": 64} if name == "apollo" else {}))
        optimiser.step()
        tensors = [v for s in optimiser.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
        sizes[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sizes["apollo"] < sizes["adamw"] / 10
    assert sizes["apollo_mini"] < sizes["adamw"] / 400


@pytest.mark.slow
def test_those_are_the_shapes_of_the_bundled_model() -> None:
    from bench.optimisers import shapes

    found = shapes("smollm2")
    assert len(found) == 30 * 7
    assert sorted(shape for _, shape in found[:7]) == sorted(
        [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    )
