"""What the tests of optimisers share: a small network that learns a task, and gradients for one matrix."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

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
