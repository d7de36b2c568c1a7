"""APOLLO's rule: the raw gradient, scaled by what Adam would do to it in a small random projection.

Zhu et al. 2025, arXiv:2412.05270, with the norm-growth limiter of Fira, arXiv:2410.01623. Written from the papers. The
c channels of a matrix are its longer side; its shorter side, of length d, is projected to r numbers:

    R = P G                                       the gradient, projected: r numbers per channel
    R~ = Adam's step of R                         its moments carry over when P changes
    s_j = ||R~_j|| / ||R_j||                      one factor per channel j; Mini: one per matrix, over all of R
    U = s G;  U *= min(1, limiter ||U_before|| / ||U||)
    W -= lr sqrt(d / r) U

Adam's bias correction is part of R~, so that the limiter does not react to its decay. ||U|| is approximated by ||R~||,
which needs no pass over G. Adam's step has a norm near sqrt(r) in the projection and near sqrt(d) without it, hence the
factor sqrt(d / r): learning rates are those of AdamW. With r = d nothing is projected, which is Adam with one factor
per channel.

P is drawn anew every `refresh` steps, from the seed, the parameter's name and the number of the period; on the CPU, so
that it is the same for every device. There are two kinds, both unbiased (E[P' P] is the identity) and with about the
same variance, 2 / r of a squared norm:

    signs      every coordinate is added to one of r sums, with a random sign (Charikar et al. 2002, feature hashing):
               c d additions, no matrix
    gaussian   the paper's: entries N(0, 1 / r); c d r multiplications, which takes longer than the rest of the step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.seeds import child_seed
from steer.training.optimisers import _optimiser
from steer.training.optimisers._optimiser import Batch, fused_adamw
from steer.training.optimisers._protocol import Parameters
from vectors.registry.options import Option

KINDS = ("signs", "gaussian")
PROJECTION = Option("projection", "signs", "the kind of random projection", choices=KINDS)
REFRESH = Option("refresh", 200, "steps until a new random projection", low=1)
LIMITER = Option("limiter", 1.01, "largest ratio of a step's norm to that of the step before", low=1)
SCALE = Option("scale", 1.0, "factor of the step of matrices, besides sqrt(side / rank)", low=0, open_low=True)
MEAN = Option(
    "mean_dtype",
    "bfloat16",
    "number format of the mean of projected gradients; its rounding is a hundredth of the projection's noise",
    choices=("bfloat16", "float32"),
)

OPTIONS = (REFRESH, LIMITER, SCALE, PROJECTION)  # of APOLLO and its Mini


class Apollo:
    """The update rule; a class because projections live until they are refreshed. They are not saved with the state."""

    def __init__(self) -> None:
        self.projections: dict[str, tuple[Any, Tensor]] = {}

    def __call__(self, batch: Batch) -> None:
        """Update matrices in place; see the module's docstring."""
        rest: list[Any] = []
        fast: list[Any] = []
        for name, weight, gradient, state in zip(
            batch.names, batch.weights, batch.gradients, batch.states, strict=True
        ):
            chosen = fast if suits_kernels(weight, gradient, batch.group) else rest
            chosen.append((name, weight.detach(), gradient, state, batch.group))
        for matrix in rest:
            self._move(*matrix)
        if fast:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(lambda matrix: self._move_by_kernels(*matrix), fast))

    def _move(self, name: str, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update one matrix [m, n] in place; `side` is the dimension that is projected."""
        side = 1 if weight.shape[0] >= weight.shape[1] else 0
        length = weight.shape[side]
        rank = min(group["rank"], length)
        projected = gradient
        if rank < length:
            projection = self._projection(name, length, rank, state, group).to(weight)
            projected = (folded if group["projection"] == "signs" else multiplied)(gradient, projection, rank, side)
        step = adam_step(projected, state, group)
        state["steps"] += 1
        over = side if group["channels"] else (0, 1)
        norms, sizes = norm(step, over), norm(projected, over)
        # A channel without a gradient does not move, whatever its moments are: its factor would be infinite.
        factors = torch.where(sizes > 0, norms / sizes, 0)
        factors *= limited(torch.linalg.vector_norm(norms), state["last_norm"], group["limiter"])
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        size = group["lr"] * group["scale"] * math.sqrt(length / rank)
        weight.addcmul_(gradient, factors, value=-size)

    def _move_by_kernels(
        self, name: str, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The same in two passes over the gradient, on the CPU, in one thread."""
        from steer.training.optimisers import _kernels

        by_rows = weight.shape[0] >= weight.shape[1]
        side = 1 if by_rows else 0
        length, channels, rank = weight.shape[side], weight.shape[1 - side], group["rank"]
        signs = self._projection(name, length, rank, state, group)
        if "steps" not in state:
            begin(state, (channels, rank) if by_rows else (rank, channels), weight, group)
        state["steps"] += 1
        beta1, beta2, count = group["beta1"], group["beta2"], state["steps"]
        corrections = (1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count))
        amount = group["lr"] * group["scale"] * math.sqrt(length / rank)
        step = _kernels.step_rows if by_rows else _kernels.step_columns
        step(
            weight.numpy(),
            gradient.numpy(),
            signs.numpy(),
            state["exp_avg"].view(torch.uint16).numpy(),
            state["exp_avg_sq"].numpy(),
            state["last_norm"].view(1).numpy(),
            np.array([1 - beta1, beta2, 1 - beta2, *corrections, group["eps"]], np.float32),
            np.array([group["limiter"], amount, 1 - group["lr"] * group["weight_decay"]], np.float32),
        )

    def _projection(self, name: str, length: int, rank: int, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The random numbers of the current period, drawn once per period."""
        key = (group["projection"], group["seed"], state.get("steps", 0) // group["refresh"], length, rank)
        if name not in self.projections or self.projections[name][0] != key:
            self.projections[name] = (
                key,
                draw(group["projection"], child_seed(key[1], "projection", name, key[2]), length, rank),
            )
        return self.projections[name][1]


def draw(kind: str, seed: int, length: int, rank: int) -> Tensor:
    """The random numbers of a projection: `signs` [length], or the matrix [length, rank] of a `gaussian` one."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "signs":
        return torch.randint(0, 2, (length,), generator=generator).float() * 2 - 1
    return torch.randn(length, rank, generator=generator) / math.sqrt(rank)


def folded(gradient: Tensor, signs: Tensor, rank: int, side: int) -> Tensor:
    """Signed sums of every rank-th coordinate along `side` of a matrix: that side becomes `rank` long.

    `signs` [length of the side] are 1 or -1.
    """
    rows = gradient.shape[side] // rank
    signs = signs if side == 1 else signs[:, None]
    whole, rest = (
        gradient.narrow(side, 0, rows * rank),
        gradient.narrow(side, rows * rank, signs.shape[0] - rows * rank),
    )
    sums = (whole.unflatten(side, (rows, rank)) * signs[: rows * rank].unflatten(0, (rows, rank))).sum(side)
    if rest.numel():
        sums.narrow(side, 0, rest.shape[side]).addcmul_(rest, signs[rows * rank :])
    return sums


def multiplied(gradient: Tensor, matrix: Tensor, rank: int, side: int) -> Tensor:
    """The gradient times a matrix [length, rank] along `side`: that side becomes `rank` long."""
    return gradient @ matrix if side == 1 else matrix.T @ gradient


def norm(matrix: Tensor, dims: int | tuple[int, int]) -> Tensor:
    """The norms over one dimension or both; these dimensions remain, with length 1."""
    if dims == 0:  # torch's own norm reads column by column, several times slower
        return matrix.square().sum(0, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(matrix, dim=dims, keepdim=True)


def adam_step(projected: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Minus Adam's step of a projected gradient, at learning rate 1; updates the moments."""
    if "steps" not in state:
        begin(state, projected.shape, projected, group)
    # From zero, AdamW's fused step at learning rate 1 leaves the step itself: one pass instead of eight.
    step = torch.zeros_like(projected)
    count = torch.full((), float(state["steps"]), dtype=torch.float32, device=projected.device)
    mean = state["exp_avg"].to(projected.dtype)
    settings = {key: group[key] for key in ("beta1", "beta2", "eps")}
    fused_adamw([step], [projected], [mean], [state["exp_avg_sq"]], [count], lr=1.0, weight_decay=0.0, **settings)
    if mean is not state["exp_avg"]:
        state["exp_avg"].copy_(mean)
    return step


def begin(state: dict[str, Any], shape: Sequence[int], like: Tensor, group: dict[str, Any]) -> None:
    """Set up the state of a matrix: moments of shape `shape`, on the device and in the dtype of `like`."""
    state["steps"] = 0
    state["exp_avg"] = like.new_zeros(shape, dtype=getattr(torch, group["mean_dtype"]))
    state["exp_avg_sq"] = like.new_zeros(shape)
    state["last_norm"] = like.new_zeros(())


def suits_kernels(weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> bool:
    """Whether _kernels.py can update this matrix."""
    return (
        group["channels"]
        and group["projection"] == "signs"
        and group["mean_dtype"] == "bfloat16"
        and group["rank"] < min(weight.shape)
        and weight.dtype == gradient.dtype == torch.float32
        and weight.device.type == gradient.device.type == "cpu"
        and weight.is_contiguous()
        and gradient.is_contiguous()
    )


def limited(size: Tensor, last: Tensor, limiter: float) -> Tensor:
    """The factor that keeps a step of norm `size` at or below `limiter` times the last; updates the last.

    A step of norm 0, as for an adapter without a gradient, does not become the last norm: no step could follow it.
    Everything stays on the device, so nothing synchronises.
    """
    factor = torch.where(last > 0, (limiter * last / size).clamp_(max=1), 1)
    last.copy_(torch.where(size > 0, size * factor, last))
    return factor


def build(parameters: Parameters, group: dict[str, Any], *, lr: float, seed: int) -> torch.optim.Optimizer:
    """APOLLO over the matrices, AdamW over all else; `group` has all options of both."""
    rounding = group.pop("rounding")
    adam = {key: group[key] for key in ("beta1", "beta2", "eps")}
    return _optimiser.rule_and_adamw(
        parameters, "apollo", Apollo(), {**group, "rule": "apollo"}, adam, lr=lr, seed=seed, rounding=rounding
    )
