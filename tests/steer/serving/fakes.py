"""Stand-ins for vLLM's objects, with the attributes that steering reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from steer.serving.engine.resolved import RESOLVED, ResolvedRequest
from vectors.expression import Composition, parse
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

LAYERS, HIDDEN = 4, 8


def vectors() -> dict[str, SteeringVector]:
    """Three vectors for a model of 4 layers and hidden size 8."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: SteeringVector({i: torch.randn(HIDDEN, generator=generator) for i in range(LAYERS)})
        for name in ("warm", "formal", "calm")
    }


def probes() -> dict[str, Probe]:
    """Two probes of the same model, which read layers 0 and 1."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: Probe({layer: Readout(torch.randn(HIDDEN, generator=generator), bias)})
        for name, layer, bias in (("anger", 0, 0.3), ("joy", 1, -0.2))
    }


def resolve(expression: str, known: Mapping[str, SteeringVector]) -> ResolvedRequest:
    """An expression over these vectors."""
    composition = parse(expression)
    return ResolvedRequest(str(composition), {name: known[name].digest for name in composition.names})


def resolved(expression: str, known: Mapping[str, SteeringVector]) -> dict[str, Any]:
    """Extra arguments as they leave admission."""
    return {"steer": expression, RESOLVED: resolve(expression, known).values()}


def request(
    name: str, extra: Mapping[str, Any] | None = None, *, prompt: Sequence[int] = (5, 6, 7), **more: Any
) -> SimpleNamespace:
    """A request, as the front end and the scheduler see it."""
    parameters = SimpleNamespace(extra_args=dict(extra) if extra is not None else None, stop=more.pop("stop", None))
    return SimpleNamespace(
        request_id=name,
        req_id=name,
        sampling_params=parameters,
        prompt_token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        cache_salt=None,
        resumable=False,
        num_computed_tokens=0,
        **more,
    )


def changed(stream: Tensor, composition: Composition, layer: int, vectors: Mapping[str, SteeringVector]) -> Tensor:
    """The obvious reference: the language's own words, in float64, every term reading h as it was, without scopes."""
    h = stream.double()
    result = h.clone()
    for term in composition.terms:
        vector = vectors[term.name]
        if layer not in (term.layers if term.layers is not None else vector.apply):
            continue
        v = vector.layers[layer].double()
        u = v / v.norm() if v.norm() > 0 else v
        along = h @ u
        if term.operation == "add":
            result += term.value * v
        elif term.operation == "ablate":
            result -= term.value * along[:, None] * u
        elif v.norm() > 0:
            result += (term.value * v.norm() - along)[:, None] * u
    return result
