"""Optimisers: against slow references, through checkpoints, and on weights that lose small steps."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor, nn

from probes.seeds import child_seed
from steer.training import optimisers
from steer.training.optimisers import _apollo, _optimiser, _rounding
from vectors.errors import ArtifactError, UsageError

NAMES = ("adamw", "apollo", "apollo_mini", "muon")
Named = list[tuple[str, nn.Parameter]]


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tall, a square and a wide matrix, an embedding, biases and a norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "embed_tokens": nn.Embedding(20, 12),
            "up": nn.Linear(12, 40),
            "square": nn.Linear(40, 40),
            "norm": nn.LayerNorm(40),
            "down": nn.Linear(40, 7),
            "lm_head": nn.Linear(7, 20),
        }
        return nn.ModuleDict(parts).to(dtype)


def loss_of(model: Any, step: int) -> Tensor:
    """The loss on a batch of a task that can be learned: the next of twenty tokens in a fixed cycle."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 20, (32,), generator=generator)
    hidden = torch.tanh(model["up"](model["embed_tokens"](tokens)))
    hidden = model["down"](model["norm"](torch.tanh(model["square"](hidden))))
    return nn.functional.cross_entropy(model["lm_head"](hidden).float(), (7 * tokens + 3) % 20)


def train(model: Any, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimiser.zero_grad()
        loss_of(model, step).backward()
        optimiser.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = weights(a), weights(b)
    return all(torch.equal(first[name], second[name]) for name in first)


def saved(optimiser: torch.optim.Optimizer) -> Any:
    """What a checkpoint gives back: written, and read without unpickling."""
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def one(shape: tuple[int, ...], name: str = "w", dtype: torch.dtype = torch.float64) -> Named:
    generator = torch.Generator().manual_seed(5)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))]


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    steady = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [steady + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def apply(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, given: list[Tensor]) -> list[Tensor]:
    """The weights after every gradient."""
    after = []
    for gradient in given:
        parameter.grad = gradient.to(parameter.dtype)
        optimiser.step()
        after.append(parameter.detach().clone())
    return after


def slow_apollo(
    start: Tensor,
    given: list[Tensor],
    project: Callable[[int], Tensor],
    *,
    lr: float,
    weight_decay: float,
    limiter: float = 1.01,
    mini: bool = False,
) -> list[Tensor]:
    """APOLLO of a matrix [d, c] with d <= c, by the formulas of the paper, one channel after another.

    `project(step)` is P [r, d]. The norm of the limiter is the projected one.
    """
    weight = start.clone()
    r, c = project(0).shape[0], start.shape[1]
    mean, square = torch.zeros(r, c, dtype=torch.float64), torch.zeros(r, c, dtype=torch.float64)
    last, after = 0.0, []
    for t, gradient in enumerate(given):
        projected = project(t) @ gradient
        mean = 0.9 * mean + 0.1 * projected
        square = 0.999 * square + 0.001 * projected**2
        step = (mean / (1 - 0.9 ** (t + 1))) / ((square / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        update = torch.empty_like(weight)
        for j in range(c):
            factor = step.norm() / projected.norm() if mini else step[:, j].norm() / projected[:, j].norm()
            update[:, j] = factor * gradient[:, j]
        size = float(step.norm())
        if last and size > limiter * last:
            update, size = update * limiter * last / size, limiter * last
        last = size
        weight = weight - lr * weight_decay * weight - lr * math.sqrt(start.shape[0] / r) * update
        after.append(weight)
    return after


# What the steps are.


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


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (6, 6)])
def test_apollo_at_full_rank_is_adam_with_one_factor_a_channel(shape: tuple[int, int]) -> None:
    named, given = one(shape), gradients(shape, 30)
    start = named[0][1].detach().clone()
    optimiser = optimisers.create("apollo", named, lr=0.01, weight_decay=0.1, rank=6, mean_dtype="float32", limiter=1e9)
    optimiser.param_groups[0]["mean_dtype"] = "float64"
    got = apply(optimiser, named[0][1], given)
    # Plain Adam's step of the whole gradient, whose norm each channel of the raw gradient is given.
    exact = nn.Parameter(torch.zeros_like(start))
    adam = torch.optim.Adam([exact], lr=1.0)
    weight, side = start.clone(), 1 if shape[0] >= shape[1] else 0
    for gradient, after in zip(given, got, strict=True):
        exact.data.zero_()
        exact.grad = gradient.clone()
        adam.step()
        factor = exact.detach().norm(dim=side, keepdim=True) / gradient.norm(dim=side, keepdim=True)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * factor * gradient
        torch.testing.assert_close(after, weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("kind", ["signs", "gaussian"])
@pytest.mark.parametrize("transposed", [False, True])
def test_apollo_is_what_the_formulas_say(kind: str, mini: bool, transposed: bool) -> None:
    d, c, r, refresh = 11, 17, 1 if mini else 4, 8
    given = gradients((d, c), 20)
    named = one((d, c), "layer.w")
    start = named[0][1].detach().clone()
    if transposed:
        named[0][1].data = start.T.contiguous()
    options: dict[str, Any] = {} if mini else {"rank": r, "mean_dtype": "float32"}
    name = "apollo_mini" if mini else "apollo"
    optimiser = optimisers.create(
        name, named, lr=0.01, weight_decay=0.1, seed=3, projection=kind, refresh=refresh, **options
    )
    optimiser.param_groups[0]["mean_dtype"] = "float64"

    def project(t: int) -> Tensor:
        drawn = _apollo.draw(kind, child_seed(3, "projection", "layer.w", t // refresh), d, r)
        if kind == "gaussian":
            return drawn.double().T
        matrix = torch.zeros(r, d, dtype=torch.float64)
        for i in range(d):
            matrix[i % r, i] = drawn[i]
        return matrix

    got = apply(optimiser, named[0][1], [g.T.contiguous() for g in given] if transposed else given)
    expected = slow_apollo(start, given, project, lr=0.01, weight_decay=0.1, mini=mini)
    for after, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(after.T if transposed else after, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (9, 700), (700, 9), (16, 16), (65, 64)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_do_what_the_plain_way_does(
    shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(threads)
    ends, calls = [], []
    monkeypatch.setattr(_apollo.Apollo, "_move", lambda *given: calls.append(1) or _plain_move(*given))
    for kernels in (True, False):
        named = [(name, parameter) for name in "ab" for _, parameter in one(shape, dtype=torch.float32)]
        optimiser = optimisers.create("apollo", named, lr=0.01, weight_decay=0.1, rank=8, refresh=5)
        if not kernels:
            monkeypatch.setattr(_apollo, "suits_kernels", lambda *given: False)
        for size, gradient in zip([1e-3, 5e-3, 1e-9] * 4, gradients(shape, 12), strict=True):
            for _, parameter in named:
                parameter.grad = (size * gradient).float()
            optimiser.step()
        assert len(calls) == (0 if kernels else 24)
        ends.append([(p.detach(), optimiser.state[p]) for _, p in named])
        assert not torch.equal(ends[-1][0][0], ends[-1][1][0])  # names draw different projections
    for (fast, kept), (slow, expected) in zip(*ends, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept["exp_avg_sq"], expected["exp_avg_sq"], rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(kept["exp_avg"], expected["exp_avg"], rtol=2**-6, atol=1e-7)
        torch.testing.assert_close(kept["last_norm"], expected["last_norm"], rtol=1e-4, atol=0)
        assert kept["steps"] == expected["steps"] == 12


_plain_move = _apollo.Apollo._move


@pytest.mark.parametrize("kind", _apollo.KINDS)
def test_projections_keep_norms_on_average_with_the_variance_of_gaussian_ones(kind: str) -> None:
    d, r = 96, 16
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, d, generator=generator, dtype=torch.float64)
    vectors /= vectors.norm()
    project = _apollo.folded if kind == "signs" else _apollo.multiplied
    squares = torch.stack(
        [project(vectors, _apollo.draw(kind, seed, d, r).double(), r, 1).square().sum() for seed in range(4000)]
    )
    assert abs(squares.mean() - 1) < 0.03  # the standard error is sqrt(2 / 16 / 4000) = 0.006
    assert squares.var() < 1.2 * 2 / r


def test_the_limiter_lets_a_step_grow_by_one_in_a_hundred() -> None:
    named = one((8, 8))
    optimiser = optimisers.create("apollo", named, lr=1.0, rank=8)
    calm, wild = gradients((8, 8), 2)
    after = [named[0][1].detach().clone(), *apply(optimiser, named[0][1], [calm] * 3 + [1000 * wild] * 4)]
    sizes = [float((b - a).norm()) for a, b in itertools.pairwise(after)]
    growth = [b / a for a, b in itertools.pairwise(sizes)]
    assert max(growth) < 1.0101
    assert max(growth[2:]) > 1.0099  # it was at work


def test_after_a_step_of_nothing_there_are_steps_again() -> None:
    named = one((8, 8))
    optimiser = optimisers.create("apollo", named, lr=0.1, rank=4)
    first, *_, last = apply(optimiser, named[0][1], [*gradients((8, 8), 2), torch.zeros(8, 8), *gradients((8, 8), 3)])
    assert (last - first).norm() > 0.1


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


# State, checkpoints, order.


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


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_a_projection_lasts_two_hundred_steps_and_the_next_differs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = one((8, 12))
    drawn: list[Tensor] = []
    plain = _apollo.draw
    monkeypatch.setattr(_apollo, "draw", lambda *given: drawn.append(plain(*given)) or drawn[-1])
    optimiser = optimisers.create(name, named, lr=1e-3, **({"rank": 5} if name == "apollo" else {}))
    apply(optimiser, named[0][1], gradients((8, 12), 1) * 200)
    assert len(drawn) == 1
    apply(optimiser, named[0][1], gradients((8, 12), 1))
    assert len(drawn) == 2
    assert not torch.equal(*drawn)


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


# Weights in bfloat16.


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


# Bad input.


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
