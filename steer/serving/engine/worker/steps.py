"""The terms of a composition that are computed one after another, as steps at fixed addresses.

Steps are shares of the token's norm, rotations, and every term behind a rotation (`Composition.steps`). A step has a
unit direction u and six factors. With b the stream that it reads, it changes the stream by

    (level + gain <b, u> + share |b|) u                 or, where cosine and sine are not both zero, turns b towards u

b is the stream as it entered the block, or, from a step that is `fresh` on, the stream as it is by then: that of a
rotation, and that of the first term behind one. An empty step has a zero direction and zero factors, and changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probes.operations import NO_PLANE
from steer.serving.engine.worker.transfers import to_device
from vectors.expression import Term

FACTORS = 6
LEVEL, GAIN, SHARE, COSINE, SINE, FRESH = range(FACTORS)


def change_of(stream: Tensor, change: Tensor, slots: Tensor, units: Tensor, factors: Tensor) -> Tensor:
    """The change of the stream [tokens, hidden], float32, after the steps; `change` is that before them.

    `slots` [tokens] is the slot of each token; `units` is [S, slots, hidden], `factors` [S, slots, 6].
    """
    read = stream
    for k in range(units.shape[0]):
        unit = units[k].index_select(0, slots)
        level, gain, share, cosine, sine, fresh = factors[k].index_select(0, slots).split(1, dim=-1)
        read = torch.where(fresh > 0, stream + change, read)
        component = (read * unit).sum(-1, keepdim=True)
        beyond = read - component * unit
        height, norm = _norm(beyond), _norm(read)
        # In the plane of the stream and the direction; the height turns negative where the direction is passed.
        along, above = cosine * component + sine * height, cosine * height - sine * component
        along = torch.where(above < 0, torch.copysign(norm, sine), along)
        turned = (along - component) * unit + (above.clamp(min=0) / height.clamp(min=1e-30) - 1) * beyond
        turns = (cosine.abs() + sine.abs() > 0) & (height > NO_PLANE * norm)
        change = change + torch.where(turns, turned, (level + gain * component + share * norm) * unit)
    return change


def _norm(rows: Tensor) -> Tensor:
    return (rows * rows).sum(-1, keepdim=True).sqrt()


def factors_of(
    terms: Sequence[tuple[Term, np.ndarray, np.ndarray, np.ndarray, np.ndarray]], slots: int, layers: int, steps: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The factors [layers, S, slots, 6] of steps in order, and for each term the number of its step at each layer.

    A term comes with the slots that it acts in (a mask), and the layers at which it acts; at each of these layers, the
    length of its direction and the mean projection on it, in units of strength. Where the length is 0 it has no step.
    Raises ValueError when a layer needs more than S steps.
    """
    factors = np.zeros((layers, steps, slots, FACTORS))
    used = np.zeros(layers, dtype=np.int64)
    fresh = np.zeros((layers, slots), dtype=bool)  # whether the next term that acts there reads what a rotation made
    numbers = []
    for term, acting, acting_layers, lengths, means in terms:
        placed = lengths > 0
        where, lengths, means = acting_layers[placed], lengths[placed], means[placed]
        number = np.full(layers, -1)
        number[where] = used[where]
        used[where] += 1
        if (used > steps).any():
            raise ValueError(f"a layer needs more than {steps} steps")
        numbers.append(number)
        in_slots = np.nonzero(acting)[0]
        index = where[:, None], number[where][:, None], in_slots[None]
        at = where[:, None], in_slots[None]
        for column, value in _values(term, lengths, means).items():
            factors[(*index, column)] = value[:, None]
        turns = term.operation == "rotate"
        factors[(*index, FRESH)] = np.where(fresh[at] | turns, 1.0, 0.0)
        fresh[at] = turns
    return factors.astype(np.float32), numbers


def _values(term: Term, lengths: np.ndarray, means: np.ndarray) -> dict[int, np.ndarray]:
    """The factors of a term by column, at layers where its direction has these lengths and mean projections."""
    same = np.ones_like(lengths)
    if term.operation == "rotate":
        angle = math.radians(term.value)
        return {COSINE: math.cos(angle) * same, SINE: math.sin(angle) * same}
    if term.operation == "share":
        return {SHARE: term.value / 100 * same}
    level, gain = projection_of(term, lengths, means)
    return {LEVEL: level, GAIN: gain}


def projection_of(term: Term, lengths: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(level, gain) of the other operations along the unit direction: (level + gain <h, u>) u is what they add."""
    nothing = np.zeros_like(lengths)
    return {
        "add": (term.value * lengths, nothing),
        "ablate": (nothing, nothing - term.value),
        "mean_ablate": (term.value * means * lengths, nothing - term.value),
        "clamp": (term.value * lengths, nothing - 1.0),
    }[term.operation]


def units_of(
    numbers: Sequence[np.ndarray],
    sources: Sequence[tuple[Tensor, np.ndarray]],
    layers: int,
    steps: int,
    hidden: int,
    device: torch.device,
) -> Tensor:
    """The unit directions [layers, S, hidden] of steps, on a device.

    `numbers` are those of `factors_of`; a source has the units of a term's vector, and the row of each layer in it.
    """
    units = torch.zeros(layers, steps, hidden, device=device)
    for number, (directions, rows) in zip(numbers, sources, strict=True):
        placed = np.nonzero(number >= 0)[0]
        places = to_device(placed, device), to_device(number[placed], device)
        units[places] = directions.to(device, non_blocking=True)[to_device(rows[placed], device)]
    return units


def table_of(layers: int, steps: int, slots: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty units [layers, S, slots, hidden] and factors [layers, S, slots, 6] on a device, float32."""
    return (
        torch.zeros(layers, steps, slots, hidden, device=device),
        torch.zeros(layers, steps, slots, FACTORS, device=device),
    )
