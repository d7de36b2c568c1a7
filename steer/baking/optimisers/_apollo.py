"""APOLLO's rule: the raw gradient, scaled by what Adam would do to it in a small random projection.

Zhu et al. 2025, arXiv:2412.05270, with the norm-growth limiter of Fira, arXiv:2410.01623. Written from the papers.

A matrix is seen with its longer side first: channels [c, d], d <= c. With P [d, r], entries N(0, 1/r):

    R = G P                                       the gradient, projected
    R~ = Adam's step of R                         moments [c, r], kept across projections
    s_j = ||R~_j|| / ||R_j||                      one factor a channel; of the whole matrix for Mini
    U = s G;  U *= min(1, limit ||U_before|| / ||U||)
    W -= lr sqrt(d / r) U

The bias correction is inside R~, so that the limiter sees growth and not the correction's decay. sqrt(d / r) makes up
for Adam's step having a norm of about sqrt(r) where it would have sqrt(d): learning rates are those of AdamW. With
r = d nothing is projected: that is Adam with one factor a channel. P is drawn anew every `refresh` steps, from the seed,
the parameter's name and the number of the period, on the CPU, so that a device draws what another would.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from merges.options import Option
from probes.seeds import child_seed
from steer.baking.optimisers._optimiser import Batch, fused_adamw

REFRESH = Option("refresh", 200, "steps until a new random projection", low=1)
LIMITER = Option("limiter", 1.01, "the most by which a step's norm grows over the last one's", low=1)
SCALE = Option("scale", 1.0, "multiplies the step of matrices, over sqrt(side / rank)", low=0, open_low=True)
MEAN = Option(
    "mean_dtype",
    "bfloat16",
    "of the mean of projected gradients; what it rounds is a hundredth of the projection's noise",
    choices=("bfloat16", "float32"),
)
KEEP = Option("keep_projections", True, "keep each projection until the next, in memory alone; else draw it every step")


def projection(seed: int, name: str, period: int, side: int, rank: int) -> Tensor:
    """P [side, rank] of a period, entries N(0, 1 / rank), float32 on the CPU."""
    generator = torch.Generator().manual_seed(child_seed(seed, "projection", name, period))
    return torch.randn(side, rank, generator=generator) / math.sqrt(rank)


class Apollo:
    """The rule; a class because projections live until they are refreshed. They are never part of the state."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.kept: dict[str, tuple[Any, Tensor]] = {}

    def __call__(self, batch: Batch) -> None:
        """Move matrices; see the module's docstring."""
        for name, weight, gradient, state in zip(
            batch.names, batch.weights, batch.gradients, batch.states, strict=True
        ):
            if weight.shape[0] < weight.shape[1]:
                weight, gradient = weight.T, gradient.T
            self._move(name, weight.detach(), gradient, state, batch.group)

    def _move(self, name: str, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move one matrix [c, d], d <= c."""
        rank = min(group["rank"], weight.shape[1])
        projected = gradient if rank == weight.shape[1] else gradient @ self._projection(name, weight, state, group)
        step = adam_step(projected, state, group)
        state["steps"] += 1
        if group["channels"]:
            factors = norms(step) / norms(projected).clamp_(min=torch.finfo(projected.dtype).tiny)
            norm = torch.linalg.vector_norm(factors * norms(gradient))
        else:
            factors = torch.linalg.vector_norm(step)
            factors /= torch.linalg.vector_norm(projected).clamp_(min=torch.finfo(projected.dtype).tiny)
            norm = factors * torch.linalg.vector_norm(gradient)
        factors *= limited(norm, state["last_norm"], group["limiter"])
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        size = group["lr"] * group["scale"] * math.sqrt(weight.shape[1] / rank)
        weight.addcmul_(gradient, factors[:, None] if group["channels"] else factors, value=-size)

    def _projection(self, name: str, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """P of the current period, on the weight's device and in its dtype."""
        key = (group["seed"], state.get("steps", 0) // group["refresh"], group["rank"])
        if name in self.kept and self.kept[name][0] == key:
            return self.kept[name][1]
        found = projection(group["seed"], name, key[1], weight.shape[1], group["rank"]).to(weight)
        if self.keep:
            self.kept[name] = (key, found)
        return found


def norms(matrix: Tensor) -> Tensor:
    """The norm of each channel [c] of a matrix [c, d]."""
    return torch.linalg.vector_norm(matrix, dim=1)


def adam_step(projected: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Minus Adam's step of a projected gradient [c, r], at learning rate 1; updates the moments."""
    if "steps" not in state:
        state["steps"] = 0
        state["exp_avg"] = torch.zeros_like(projected, dtype=getattr(torch, group["mean_dtype"]))
        state["exp_avg_sq"] = torch.zeros_like(projected)
        state["last_norm"] = torch.zeros((), dtype=projected.dtype, device=projected.device)
    # From zero, AdamW's fused step at learning rate 1 leaves the step itself: one pass instead of eight.
    moved = torch.zeros_like(projected)
    count = torch.full((), float(state["steps"]), dtype=torch.float32, device=projected.device)
    mean = state["exp_avg"].to(projected.dtype)
    settings = {key: group[key] for key in ("beta1", "beta2", "eps")}
    fused_adamw([moved], [projected], [mean], [state["exp_avg_sq"]], [count], lr=1.0, weight_decay=0.0, **settings)
    if mean is not state["exp_avg"]:
        state["exp_avg"].copy_(mean)
    return moved


def limited(norm: Tensor, last: Tensor, limit: float) -> Tensor:
    """What to multiply a step of that norm with, so that it grows by no more than `limit`; updates the last norm.

    A step of norm 0, as of an expert that saw no token, is not remembered: nothing could grow from it. Stays on the
    device: nothing waits for a number.
    """
    factor = torch.where(last > 0, (limit * last / norm).clamp_(max=1), 1)
    last.copy_(torch.where(norm > 0, norm * factor, last))
    return factor
