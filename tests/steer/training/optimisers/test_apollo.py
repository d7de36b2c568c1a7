"""APOLLO against a slow reference by the formulas of its paper, its projections and its limiter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import apply, gradients, one
from torch import Tensor, nn

from probes.seeds import child_seed
from steer.training import optimisers
from steer.training.optimisers import _apollo


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
