"""Muon: momentum whose matrices are made orthogonal, with AdamW for what is not a matrix."""

from __future__ import annotations

from typing import Any

import torch

from steer.training.optimisers import _optimiser
from steer.training.optimisers._protocol import Parameters
from vectors.registry.options import Option

SUMMARY = "Muon for matrices, AdamW for the rest"
SOURCE = "Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982; torch.optim.Muon"
OPTIONS = (
    Option("momentum", 0.95, "decay of the mean of gradients, for matrices", low=0, high=0.9999),
    *_optimiser.ADAMW_OPTIONS,
)


def build(
    parameters: Parameters, *, lr: float, weight_decay: float, seed: int, momentum: float, rounding: str, **adam: Any
) -> torch.optim.Optimizer:
    """Muon over the matrices, AdamW over embeddings, head, norms and all else.

    Its steps are scaled to the root mean square of AdamW's (`match_rms_adamw`), so one learning rate serves both.
    Weight decay is 0 unless given: torch's 0.1 is meant for pre-training. State of a matrix: 4 bytes per weight, half
    of AdamW's. Muon is not the default: fine-tuning with it a model pre-trained with AdamW is reported to work less
    well (arXiv:2502.16982). Raises UsageError.
    """
    group = {"name": "muon", "rule": "muon", "weight_decay": weight_decay, "momentum": momentum}
    return _optimiser.rule_and_adamw(parameters, "muon", muon, group, adam, lr=lr, seed=seed, rounding=rounding)


def muon(batch: _optimiser.Batch) -> None:
    """torch's Muon, built anew for each batch; its momentum is stored in the batch's states."""
    group = batch.group
    inner = torch.optim.Muon(
        batch.weights,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        adjust_lr_fn="match_rms_adamw",
    )
    for weight, gradient, state in zip(batch.weights, batch.gradients, batch.states, strict=True):
        weight.grad = gradient
        if "momentum_buffer" in state:
            inner.state[weight]["momentum_buffer"] = state["momentum_buffer"]
    inner.step()
    for weight, state in zip(batch.weights, batch.states, strict=True):
        state["momentum_buffer"] = inner.state[weight]["momentum_buffer"]
