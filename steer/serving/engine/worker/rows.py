"""The rows of a composition: what its slots hold at each layer, computed from the stacked directions of its vectors.

A step waits while rows are written, so whatever does not depend on the composition is computed when a vector is loaded:
its directions as one tensor, their lengths, and the unit directions. What is left is one sum of scaled stacks for each
slot, a copy of unit directions, and a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steer.serving.engine.worker.steps import factors_of, projection_of, units_of
from steer.serving.engine.worker.transfers import to_device
from vectors.expression import Composition, Term
from vectors.steering import SteeringVector


class Stack:
    """A vector as tensors, float32: `directions` and `units` [layers, hidden]; `lengths` [layers], float64.

    The unit of a zero direction is zero. On a machine with a GPU the tensors are in pinned memory, from where a copy to
    the device does not make the step wait.
    """

    def __init__(self, vector: SteeringVector, *, pinned: bool = False) -> None:
        self.vector = vector
        self.rows = {layer: row for row, layer in enumerate(vector.layers)}
        directions = torch.stack(list(vector.layers.values()))
        # In float64, where no square of a float32 overflows or vanishes.
        lengths = directions.double().norm(dim=1)
        units = (directions.double() / lengths.where(lengths > 0, torch.ones((), dtype=lengths.dtype))[:, None]).float()
        self.directions = directions.pin_memory() if pinned else directions
        self.units = units.pin_memory() if pinned else units
        self.lengths = lengths.numpy()
        self.means = np.array([vector.mean_at(layer) or 0.0 for layer in vector.layers])  # in units of strength


class Rows(NamedTuple):
    """The rows of P slots in a table of K directions and S steps, on its device, float32.

    `added` [P, layers, hidden]; `units` [layers, K, hidden], equal for all slots, and `factors` [layers, K, P, 2] with
    (level, gain): None where no term projects. A direction that a slot or layer does not need has factors zero.
    `step_units` [layers, S, hidden] and `step_factors` [layers, S, P, 6] are None where no term is a step.
    """

    added: Tensor
    units: Tensor | None
    factors: Tensor | None
    step_units: Tensor | None = None
    step_factors: Tensor | None = None


class _ActiveTerm(NamedTuple):
    """A term, the slots that it acts in (a mask over P), the layers at which it acts, as rows of the table, and whether
    it is a step.
    """

    term: Term
    slots: np.ndarray
    layers: np.ndarray
    is_step: bool


def rows_of(
    composition: Composition,
    sets: Sequence[Sequence[int]],
    stacks: Mapping[str, Stack],
    layers: Sequence[int],
    hidden: int,
    directions: int,
    device: torch.device,
    steps: int = 0,
) -> Rows:
    """The rows for sets of terms that act together, given by index, at the given layers; K is `directions`, S `steps`.

    With pipeline parallelism, `layers` are those of this worker. Raises ValueError when a layer needs more than K
    directions or S steps. That no sum overflows has been checked before (`bounds.require_applicable`).
    """
    active = _active_terms(composition, sets, stacks, layers)
    # By name: the row of the stack for each of the layers, -1 where the vector holds none.
    sources = {
        name: np.array([stacks[name].rows.get(layer, -1) for layer in layers], dtype=np.int64)
        for name in {each.term.name for each in active}
    }
    summed, stepped = ([each for each in active if each.is_step == kind] for kind in (False, True))
    rows = Rows(_added(summed, stacks, sources, len(sets), len(layers), hidden, device), None, None)
    if projecting := [each for each in summed if each.term.operation != "add"]:
        units, factors = _projections(projecting, stacks, sources, len(sets), layers, hidden, directions, device)
        rows = rows._replace(units=units, factors=to_device(factors, device))
    if stepped:
        units, factors = _steps(stepped, stacks, sources, len(sets), len(layers), hidden, steps, device)
        rows = rows._replace(step_units=units, step_factors=to_device(factors, device))
    return rows


def _active_terms(
    composition: Composition, sets: Sequence[Sequence[int]], stacks: Mapping[str, Stack], layers: Sequence[int]
) -> list[_ActiveTerm]:
    """The terms that act in any slot, in the composition's order."""
    index = {layer: i for i, layer in enumerate(layers)}
    steps = set(composition.steps)
    member = np.zeros((len(composition.terms), len(sets)), dtype=bool)
    for p, terms in enumerate(sets):
        member[list(terms), p] = True
    layer_rows: dict[tuple[str, tuple[int, ...] | None], np.ndarray] = {}
    active = []
    for t in np.nonzero(member.any(axis=1))[0].tolist():
        term = composition.terms[t]
        key = term.name, term.layers
        if key not in layer_rows:
            acting = stacks[term.name].vector.acting(term.layers)
            layer_rows[key] = np.array([index[layer] for layer in acting if layer in index], dtype=np.int64)
        if len(layer_rows[key]):
            active.append(_ActiveTerm(term, member[t], layer_rows[key], t in steps))
    return active


def _added(
    active: Sequence[_ActiveTerm],
    stacks: Mapping[str, Stack],
    sources: Mapping[str, np.ndarray],
    slots: int,
    layers: int,
    hidden: int,
    device: torch.device,
) -> Tensor:
    """`added` of Rows: the sum of the vectors, each scaled by the sum of its strengths, in order of their first terms.

    Each product and each sum is rounded for itself, so that a loop over slots and layers gives the same bits.
    """
    adding = [each for each in active if each.term.operation == "add"]
    added = torch.zeros(slots, layers, hidden, device=device)
    if all(len(each.layers) == layers == len(stacks[each.term.name].rows) for each in adding):
        # Vectors that act at all layers, as most do, have one strength for each slot.
        uniform: dict[str, np.ndarray] = {}  # by name: [slots]
        for term, acting, *_ in adding:
            uniform.setdefault(term.name, np.zeros(slots))[acting] += term.value
        for name, each in uniform.items():
            directions = stacks[name].directions.to(device, non_blocking=True)
            for p, strength in enumerate(each.tolist()):
                if strength:
                    added[p].add_(directions * strength)
        return added
    strengths: dict[str, np.ndarray] = {}  # by name: [slots, layers]
    for term, acting, acting_layers, _ in adding:
        strengths.setdefault(term.name, np.zeros((slots, layers)))[np.ix_(acting, acting_layers)] += term.value
    for name, strength in strengths.items():
        steered_layers = np.nonzero(strength.any(axis=0))[0]
        rows = sources[name][steered_layers]
        directions = stacks[name].directions.to(device, non_blocking=True)
        all_layers = len(rows) == layers == len(directions)  # both ascend, so they are the same
        if not all_layers:
            directions, index = directions[to_device(rows, device)], to_device(steered_layers, device)
        scales = to_device(strength[:, steered_layers].astype(np.float32), device)[:, :, None]
        for p in np.nonzero(strength.any(axis=1))[0].tolist():
            if all_layers:
                added[p].add_(directions * scales[p])
            else:
                added[p].index_add_(0, index, directions * scales[p])
    return added


def _projections(
    active: Sequence[_ActiveTerm],
    stacks: Mapping[str, Stack],
    sources: Mapping[str, np.ndarray],
    slots: int,
    layers: Sequence[int],
    hidden: int,
    directions: int,
    device: torch.device,
) -> tuple[Tensor, np.ndarray]:
    """`units` of Rows, and `factors` as an array.

    Terms along the same direction share it, in all slots. At each layer the directions are numbered by first use.
    """
    numbers: dict[str, np.ndarray] = {}  # by name, [layers]: the number of its direction below K, -1 for none
    used = np.zeros(len(layers), dtype=np.int64)  # directions in use at each layer
    factors = np.zeros((len(layers), directions, slots, 2))
    for term, acting, acting_layers, _ in active:
        stack, source = stacks[term.name], sources[term.name]
        # A zero vector has no direction to project along.
        projected = acting_layers[stack.lengths[source[acting_layers]] > 0]
        number = numbers.setdefault(term.name, np.full(len(layers), -1))
        unnumbered = projected[number[projected] < 0]
        number[unnumbered] = used[unnumbered]
        used[unnumbered] += 1
        if (used > directions).any():
            layer = layers[int(np.nonzero(used > directions)[0][0])]
            raise ValueError(f"layer {layer} needs more than {directions} directions")
        index = projected[:, None], number[projected][:, None], np.nonzero(acting)[0][None]
        level, gain = projection_of(term, stack.lengths[source[projected]], stack.means[source[projected]])
        factors[(*index, 0)] += level[:, None]
        factors[(*index, 1)] += gain[:, None]
    units = torch.zeros(len(layers), directions, hidden, device=device)
    for name, number in numbers.items():
        projected = np.nonzero(number >= 0)[0]
        copied = stacks[name].units.to(device, non_blocking=True)
        if len(projected) == len(layers) == len(copied) and (number == number[0]).all():
            units[:, number[0]] = copied  # both ascend, so they are the same layers
        else:
            places = to_device(projected, device), to_device(number[projected], device)
            units[places] = copied[to_device(sources[name][projected], device)]
    return units, factors.astype(np.float32)


def _steps(
    active: Sequence[_ActiveTerm],
    stacks: Mapping[str, Stack],
    sources: Mapping[str, np.ndarray],
    slots: int,
    layers: int,
    hidden: int,
    steps: int,
    device: torch.device,
) -> tuple[Tensor, np.ndarray]:
    """`step_units` of Rows, and `step_factors` as an array."""
    terms = []
    for term, acting, acting_layers, _ in active:
        rows = sources[term.name][acting_layers]
        terms.append((term, acting, acting_layers, stacks[term.name].lengths[rows], stacks[term.name].means[rows]))
    factors, numbers = factors_of(terms, slots, layers, steps)
    directions = [(stacks[each.term.name].units, sources[each.term.name]) for each in active]
    return units_of(numbers, directions, layers, steps, hidden, device), factors
