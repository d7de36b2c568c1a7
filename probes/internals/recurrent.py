"""Recurrent states (Gated DeltaNet, LFM2's convolutions): how far training moved them along a behaviour's direction.

A steering vector lies in the residual stream, and a state does not. So the direction of a behaviour in a state is how
steering by the vector changes it: d(c) = S(c; steered) - S(c), after a context c. The movement from one model to
another is (S'(c) - S(c)) . d(c) / |d(c)|^2: 1 is as far as the vector moves it at this strength. The floor repeats this
with vectors whose coordinates are shuffled, which have the same norm and no behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.intervals import CONFIDENCE, RESAMPLES
from probes.models import residual
from probes.models.tokens import Tokens
from probes.seeds import child_seed
from probes.steered import steered
from vectors.errors import ModelError
from vectors.events import Event, OnEvent, ignore
from vectors.steering import SteeringVector

SHUFFLES = 8
KINDS = {"recurrent_states": "recurrent", "conv_states": "convolution"}  # attributes of a layer of the cache

Where = tuple[int, str]  # a layer, and the kind of its state


class Movement(NamedTuple):
    """How far a state moved along the behaviour's direction: the mean over contexts with its 95 % interval.

    `cosine` is that of the whole movement with the direction. `floor` is the greatest absolute mean of the shuffled
    vectors. `size` is the movement relative to the state itself.
    """

    layer: int
    kind: str
    movement: float
    low: float
    high: float
    cosine: float
    floor: float
    size: float

    @property
    def beyond_floor(self) -> bool:
        """Whether the whole interval lies beyond what shuffled vectors reach."""
        return self.low > self.floor or self.high < -self.floor


def states(
    model: nn.Module, contexts: Sequence[Tokens], around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[Where, list[Tensor]]:
    """The recurrent states after each context, flat float64 [size], by layer and kind; `around` each forward pass.

    Raises ModelError for a model without recurrent layers.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    found: dict[Where, list[Tensor]] = {}
    with torch.inference_mode():
        for context in contexts:
            cache = DynamicCache(config=residual.text_config(model))
            with around():
                residual.decoder(model)(
                    input_ids=torch.tensor([context.ids], device=device), past_key_values=cache, use_cache=True
                )
            for layer, kept in enumerate(cache.layers):
                for attribute, kind in KINDS.items():
                    state = getattr(kept, attribute, None)
                    state = next(iter(state.values()), None) if isinstance(state, Mapping) else state
                    if isinstance(state, Tensor) and state.numel():
                        found.setdefault((layer, kind), []).append(state.double().flatten().cpu())
    if not found:
        raise ModelError(
            "the model has no recurrent layers, so there is no state",
            "use a model with Gated DeltaNet (Qwen3-Next, Qwen3.5) or convolutions (LFM2)",
        )
    return found


def movements(
    before: nn.Module,
    after: nn.Module | Mapping[Where, list[Tensor]],
    contexts: Sequence[Tokens],
    vector: SteeringVector,
    strength: float,
    seed: int,
    *,
    on_event: OnEvent = ignore,
) -> list[Movement]:
    """The movement of every recurrent state from one model to another; `after` may be the states themselves.

    States that the vector does not reach, at or below the layers where it acts, are left out. Raises ModelError where
    that is all of them, or where the models' states differ in shape.
    """
    plain = states(before, contexts)
    moved = after if isinstance(after, Mapping) else states(after, contexts)
    if {where: len(rows[0]) for where, rows in plain.items()} != {where: len(rows[0]) for where, rows in moved.items()}:
        raise ModelError("the two models have states of different shapes", "give a model and its fine-tuned copy")
    along = {**_along(before, contexts, vector, strength, plain, moved)}
    floors: dict[Where, list[float]] = {}
    for n in range(SHUFFLES):
        on_event(Event("measuring the floor", n, SHUFFLES, "shuffled vectors"))
        shuffled = _shuffled(vector, child_seed(seed, "shuffled vector", n))
        for where, (components, _) in _along(before, contexts, shuffled, strength, plain, moved).items():
            floors.setdefault(where, []).append(abs(float(components.mean())))
    if not along:
        raise ModelError(
            f"the vector reaches no recurrent state: it acts at layers {sorted(vector.apply)}, the states are those of "
            f"layers {sorted({layer for layer, _ in plain})}",
            "use a vector that acts below a recurrent layer",
        )
    found = []
    for where, (components, cosines) in along.items():
        low, high = _interval(components, child_seed(seed, "contexts", *where))
        size = [
            float((b - a).norm() / a.norm().clamp_min(1e-300)) for a, b in zip(plain[where], moved[where], strict=True)
        ]
        found.append(
            Movement(
                *where, float(components.mean()), low, high, float(cosines.mean()), max(floors.get(where, [0.0])),
                sum(size) / len(size),
            )
        )  # fmt: skip
    return found


def _along(
    model: nn.Module,
    contexts: Sequence[Tokens],
    vector: SteeringVector,
    strength: float,
    plain: Mapping[Where, list[Tensor]],
    moved: Mapping[Where, list[Tensor]],
) -> dict[Where, tuple[Tensor, Tensor]]:
    """The component and the cosine of each context's movement along the vector's direction, float64 [contexts] each."""
    turned = states(model, contexts, lambda: steered(model, strength_of(vector, strength), any_base=True))
    found = {}
    for where, rows in turned.items():
        directions = [b - a for a, b in zip(plain[where], rows, strict=True)]
        lengths = [float(each.norm()) for each in directions]
        if min(lengths) <= 1e-9 * max(float(each.norm()) for each in plain[where]):
            continue  # not reached
        changes = [b - a for a, b in zip(plain[where], moved[where], strict=True)]
        products = [float(change @ each) for change, each in zip(changes, directions, strict=True)]
        components = [product / length**2 for product, length in zip(products, lengths, strict=True)]
        cosines = [
            product / (length * max(float(change.norm()), 1e-300))
            for product, length, change in zip(products, lengths, changes, strict=True)
        ]
        found[where] = (torch.tensor(components).double(), torch.tensor(cosines).double())
    return found


def strength_of(vector: SteeringVector, strength: float) -> SteeringVector:
    """The vector as it acts, times a strength."""
    return vector.select(vector.apply) * strength


def _shuffled(vector: SteeringVector, seed: int) -> SteeringVector:
    """A vector of the same norms whose coordinates are in another order, the same at every layer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(vector.hidden_size, generator=generator)
    signs = torch.randint(2, (vector.hidden_size,), generator=generator) * 2 - 1
    return SteeringVector({i: each[order] * signs for i, each in vector.layers.items()}, {"apply": [*vector.apply]})


def _interval(values: Tensor, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(values[drawn].mean(1), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
