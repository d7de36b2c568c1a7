"""Recurrent states (Gated DeltaNet, LFM2's convolutions): how far training moved them along a behaviour's direction.

A steering vector lies in the residual stream, and a state does not. So the direction of a behaviour in a state is how
steering by the vector changes it: d(c) = S(c; steered) - S(c), after a context c. The movement from one model to
another is (S'(c) - S(c)) . d(c) / |d(c)|^2: 1 is as far as the vector moves it at this strength. The floor repeats this
with vectors whose coordinates are shuffled and change their sign at random, which have the same norm and no behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.intervals import CONFIDENCE
from probes.models import residual
from probes.models.tokens import Tokens
from probes.seeds import child_seed
from probes.statistics.family import family
from probes.statistics.verdict import FEWEST
from probes.steered import steered
from vectors.errors import ModelError, SteerError
from vectors.events import Event, OnEvent, ignore
from vectors.steering import SteeringVector

SHUFFLES = 8
KINDS = {"recurrent_states": "recurrent", "conv_states": "convolution"}  # attributes of a layer of the cache
SIZES = ("linear_", "conv_", "mamba_")  # how the sizes of recurrent layers begin in configurations
TINY = 1e-300  # in place of a norm of 0 that is divided by

Where = tuple[int, str]  # a layer, and the kind of its state


class Movement(NamedTuple):
    """How far a state moved along the behaviour's direction: the mean over contexts with its 95 % interval.

    `cosine` is that of the whole movement with the direction. `floor` is the greatest absolute mean of the shuffled
    vectors. `size` is the movement relative to the state itself. `p_adjusted` is that of a movement no farther from 0
    than the floor, corrected for the number of states. `beyond_floor` says whether it is below 5 %; it is None for
    fewer contexts than a verdict takes. A single context has no interval and no p-value.
    """

    layer: int
    kind: str
    movement: float
    low: float | None
    high: float | None
    cosine: float
    floor: float
    size: float
    p_adjusted: float | None
    beyond_floor: bool | None


class Products(NamedTuple):
    """What is kept of one context's state and a direction in it: |d|, (S' - S) . d, |S' - S| and |S|."""

    length: float
    product: float
    change: float
    norm: float

    @property
    def component(self) -> float:
        """The movement along the direction, in lengths of it."""
        return self.product / self.length**2

    @property
    def cosine(self) -> float:
        """The cosine of the movement with the direction."""
        return self.product / (self.length * max(self.change, TINY))


def states(
    model: nn.Module, context: Tokens, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[Where, Tensor]:
    """The recurrent states after a context, flat float64 [size], by layer and kind; `around` the forward pass.

    Raises ModelError for a model without recurrent layers.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    found: dict[Where, Tensor] = {}
    with torch.inference_mode():
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
                    found[layer, kind] = state.double().flatten().cpu()
    if not found:
        raise _without_state()
    return found


def movements(
    before: nn.Module,
    after: nn.Module | Callable[[Tokens], dict[Where, Tensor]],
    contexts: Sequence[Tokens],
    vector: SteeringVector,
    strength: float,
    seed: int,
    *,
    on_event: OnEvent = ignore,
) -> list[Movement]:
    """The movement of every recurrent state from one model to another; `after` may also give the states themselves.

    The states of one context are held at a time. States that the vector does not reach, at or below the layers where it
    acts, are left out. Raises ModelError where that is all of them, or where the models' states differ in shape.
    """
    every = [strength_of(vector, strength)] + [
        strength_of(_shuffled(vector, child_seed(seed, "shuffled vector", n)), strength) for n in range(SHUFFLES)
    ]
    kept: list[dict[Where, list[Products]]] = [{} for _ in every]
    for done, context in enumerate(contexts):
        on_event(Event("measuring states", done, len(contexts), "contexts"))
        for products, found in zip(kept, _products(before, after, context, every), strict=True):
            for where, each in found.items():
                products.setdefault(where, []).append(each)
    along, *shuffled = ({where: rows for where, rows in each.items() if _reached(rows)} for each in kept)
    if not along:
        raise _unreached(vector, {layer for layer, _ in kept[0]})
    floors = torch.tensor(
        [max((abs(_components(each[where]).mean().item()) for each in shuffled if where in each), default=0.0)
         for where in along], dtype=torch.float64,
    )  # fmt: skip
    tested = family(torch.stack([_components(rows) for rows in along.values()], 1), floors, seed=seed)
    return [
        Movement(
            *where, member.mean, member.low, member.high, _mean([each.cosine for each in rows]), floor,
            _mean([each.change / max(each.norm, TINY) for each in rows]), member.p_adjusted,
            None if member.p_adjusted is None or len(rows) < FEWEST else member.p_adjusted < 1 - CONFIDENCE,
        )
        for (where, rows), member, floor in zip(along.items(), tested, floors.tolist(), strict=True)
    ]  # fmt: skip


def _products(
    before: nn.Module,
    after: nn.Module | Callable[[Tokens], dict[Where, Tensor]],
    context: Tokens,
    vectors: Sequence[SteeringVector],
) -> list[dict[Where, Products]]:
    """What is kept of each state after one context, along the direction of each vector.

    States may have hundreds of megabytes, so three are held at most: one, its movement, and a direction in it.
    """
    plain = states(before, context)
    moved = states(after, context) if isinstance(after, nn.Module) else after(context)
    if {where: len(row) for where, row in plain.items()} != {where: len(row) for where, row in moved.items()}:
        raise _other_shapes()
    changes = {where: moved.pop(where) - row for where, row in plain.items()}
    norms = {where: (float(changes[where].norm()), float(row.norm())) for where, row in plain.items()}
    found = []
    for vector in vectors:
        turned = states(before, context, partial(steered, before, vector, any_base=True))
        directions = {where: turned.pop(where) - row for where, row in plain.items()}
        found.append(
            {
                where: Products(float(each.norm()), float(changes[where] @ each), *norms[where])
                for where, each in directions.items()
            }
        )
    return found


def problems_of_states(configs: Sequence[Any], vector: SteeringVector | None) -> list[SteerError]:
    """What the configurations of models (of their text parts) show to be wrong before they are loaded."""
    from transformers import DynamicCache

    layers = [
        [i for i, kept in enumerate(DynamicCache(config=each).layers) if any(hasattr(kept, name) for name in KINDS)]
        for each in configs
    ]
    if not all(layers):
        return [_without_state()]
    sizes = [
        [each.hidden_size]
        + [f"{name}: {value}" for name, value in sorted(each.to_dict().items()) if name.startswith(SIZES)]
        for each in configs
    ]
    if any(each != layers[0] for each in layers) or any(each != sizes[0] for each in sizes):
        return [_other_shapes()]
    if vector is not None and layers and not any(i > min(vector.apply) for i in layers[0]):
        return [_unreached(vector, layers[0])]
    return []


def _without_state() -> ModelError:
    return ModelError(
        "the model has no recurrent layers, so there is no state",
        "use a model with Gated DeltaNet (Qwen3-Next, Qwen3.5) or convolutions (LFM2)",
    )


def _other_shapes() -> ModelError:
    return ModelError("the two models have states of different shapes", "give a model and its fine-tuned copy")


def _unreached(vector: SteeringVector, layers: Iterable[int]) -> ModelError:
    return ModelError(
        f"the vector reaches no recurrent state: it acts at layers {sorted(vector.apply)}, the states are those of "
        f"layers {sorted(layers)}",
        "use a vector that acts below a recurrent layer",
    )


def _reached(rows: Sequence[Products]) -> bool:
    """Whether steering changes a state after every context by more than rounding."""
    return min(each.length for each in rows) > 1e-9 * max(each.norm for each in rows)


def _components(rows: Sequence[Products]) -> Tensor:
    """The movement along a direction after each context, float64 [contexts]."""
    return torch.tensor([each.component for each in rows], dtype=torch.float64)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def strength_of(vector: SteeringVector, strength: float) -> SteeringVector:
    """The vector as it acts, times a strength."""
    return vector.select(vector.apply) * strength


def _shuffled(vector: SteeringVector, seed: int) -> SteeringVector:
    """A vector of the same norms whose coordinates are in another order, some with the other sign: the same at every
    layer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(vector.hidden_size, generator=generator)
    signs = torch.randint(2, (vector.hidden_size,), generator=generator) * 2 - 1
    return SteeringVector({i: each[order] * signs for i, each in vector.layers.items()}, {"apply": [*vector.apply]})
