"""A model whose figures are known in closed form: its blocks add nothing, so a token's logits follow from itself alone.

The residual stream is the embedding of the token, steering adds to it at any layer, and the logits are the head applied
to its RMS norm. So likelihoods and divergences of every steered model can be computed by hand.
"""

from __future__ import annotations

from typing import Any

import pico
import torch
from torch import Tensor

from probes.models.loading import LoadedModel
from vectors.references import ModelSource
from vectors.steering import SteeringVector


def transparent_model(seed: int = 0) -> Any:
    """A pico Llama whose attention and MLP add nothing to the residual stream."""
    model = pico.build("llama", seed=seed)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    return model


def loaded(model: Any) -> LoadedModel:
    """The model as a command loads one."""
    from pathlib import Path

    return LoadedModel(
        model, pico.tokenizer(), ModelSource(Path("pico")), {"digest": "sha256:0", "name": "pico"}, "cpu"
    )


def logits(model: Any, ids: list[int], direction: Tensor | None = None, strength: float = 0.0) -> Tensor:
    """The logits after each token of `ids`, float64 [tokens, vocabulary], by hand."""
    states = model.model.embed_tokens.weight[torch.tensor(ids)].double()
    if direction is not None:
        states = states + strength * direction.double()
    rms = (states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    return (states / rms) @ model.lm_head.weight.double().T


def log_likelihood(
    model: Any, prompt: list[int], completion: list[int], direction: Tensor | None = None, strength: float = 0.0
) -> float:
    """The log-likelihood of a completion, by hand."""
    predicted = logits(model, [*prompt, *completion][:-1], direction, strength).log_softmax(-1)[len(prompt) - 1 :]
    return float(predicted.gather(1, torch.tensor(completion)[:, None]).sum())


def towards(model: Any, wanted: list[int], unwanted: list[int], layer: int = 1, length: float = 0.3) -> SteeringVector:
    """A vector that makes some tokens likelier and others less likely: along the difference of their head's rows."""
    head = model.lm_head.weight
    direction = head[torch.tensor(wanted)].mean(0) - head[torch.tensor(unwanted)].mean(0)
    return SteeringVector({layer: length * direction / direction.norm()}, {"apply": [layer]})
