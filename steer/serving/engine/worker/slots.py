"""The slot table: what each composition adds to the residual stream, layer by layer, at fixed addresses.

A slot holds, for every layer, a vector to add (a) and up to K directions (u, each with level c and gain g). For a token
with this slot, the residual stream h becomes

    h + a + sum_k (c_k + g_k <h, u_k>) u_k

Adding v at strength s is a = s v. Ablating it by s is u = v/|v|, g = -s, c = 0; clamping it to x is g = -1, c = x |v|.
All terms read h before any change, so terms along the same direction share one u. Slot 0 is zero: unsteered.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steer.serving.engine.phases import Phase, acting
from vectors.expression import Composition, Term
from vectors.steering import SteeringVector


class SlotContent(NamedTuple):
    """One slot on the CPU, float32: `added` [layers, hidden], `units` [layers, K, hidden], `factors` [layers, K, 2].

    `factors` holds (level, gain). Directions that a layer does not need are zero; K is 0 where no term projects.
    """

    added: Tensor
    units: Tensor
    factors: Tensor


def directions_needed(composition: Composition, vectors: Mapping[str, SteeringVector]) -> int:
    """The most directions that any layer needs; an upper bound, since terms may act in different phases."""
    return max((len(names) for names in _projected(composition.terms, vectors).values()), default=0)


def _projected(terms: Iterable[Term], vectors: Mapping[str, SteeringVector]) -> dict[int, set[str]]:
    """By layer, the names of the vectors whose directions are ablated or clamped."""
    projected: dict[int, set[str]] = {}
    for term in terms:
        if term.operation != "add" and acting(term):
            for layer in layers_of(term, vectors[term.name]):
                projected.setdefault(layer, set()).add(term.name)
    return projected


def layers_of(term: Term, vector: SteeringVector) -> tuple[int, ...]:
    """The layers at which a term acts."""
    return vector.acting(term.layers)


def content_of(
    terms: Sequence[Term], vectors: Mapping[str, SteeringVector], layers: Sequence[int], hidden: int, directions: int
) -> SlotContent:
    """The slot for terms that act together, at the given layers (those of this worker), with `directions` = K.

    Raises ValueError when a layer needs more than K directions, which admission has refused before.
    """
    everywhere = tuple(layers)
    index = {layer: i for i, layer in enumerate(everywhere)}
    count = directions if any(term.operation != "add" for term in terms) else 0
    added = torch.zeros(len(index), hidden)
    units = torch.zeros(len(index), count, hidden)
    factors = torch.zeros(len(index), count, 2)
    which: dict[str, Tensor] = {}  # by name, [layers]: which of the K directions, -1 for none
    used = torch.zeros(len(index), dtype=torch.long)  # directions in use at each layer
    even: dict[str, int] = {}  # by name: which of the K directions, where it is the same at every layer
    for term in terms:
        stack, acting_layers = _stack_of(vectors[term.name]), layers_of(term, vectors[term.name])
        gain = -term.value if term.operation == "ablate" else -1.0
        # A term at all layers needs no indexing: the same result as below at a tenth of the cost.
        if acting_layers == stack.layers == everywhere and term.operation == "add":
            added.add_(stack.stacked, alpha=term.value)
            continue
        room = term.name in even or len(even) < directions
        if acting_layers == stack.layers == everywhere and stack.directed and room and not which:
            if term.name not in even:
                even[term.name] = len(even)
                units[:, even[term.name]] = stack.units
            factors[:, even[term.name], 1] += gain
            if term.operation == "clamp":
                factors[:, even[term.name], 0] += term.value * stack.lengths
            continue
        if even and not which:
            which = {name: torch.full((len(index),), k) for name, k in even.items()}
            used += len(even)
        # With pipeline parallelism, the other layers are in other workers.
        here = [layer for layer in acting_layers if layer in index]
        at, sources = torch.tensor([index[i] for i in here]), torch.tensor([stack.rows[i] for i in here])
        if not here:
            continue
        if term.operation == "add":
            added.index_add_(0, at, stack.stacked[sources], alpha=term.value)
            continue
        nonzero = stack.lengths[sources] > 0  # a zero vector has no direction to project along
        at, sources = at[nonzero], sources[nonzero]
        k = which.setdefault(term.name, torch.full((len(index),), -1))
        new = at[k[at] < 0]
        k[new] = used[new]
        used[new] += 1
        if bool((used > directions).any()):
            layer = everywhere[int((used > directions).nonzero()[0])]
            raise ValueError(f"layer {layer} needs more than {directions} directions")
        units[at, k[at]] = stack.units[sources]
        factors[at, k[at], 1] += gain
        if term.operation == "clamp":
            factors[at, k[at], 0] += term.value * stack.lengths[sources]
    return SlotContent(added, units, factors)


class _Stack(NamedTuple):
    """A vector as tensors: `stacked`, `units` [layers, hidden], `lengths` [layers]; `rows` is the row of each layer."""

    layers: tuple[int, ...]
    rows: dict[int, int]
    stacked: Tensor
    lengths: Tensor
    units: Tensor
    directed: bool  # whether every length is positive


_STACKS: weakref.WeakKeyDictionary[SteeringVector, _Stack] = weakref.WeakKeyDictionary()


def _stack_of(vector: SteeringVector) -> _Stack:
    """Cached while the vector lives: from one tensor per layer, a new composition would take longer than a step."""
    stack = _STACKS.get(vector)
    if stack is None:
        stacked = torch.stack(list(vector.layers.values()))
        lengths = stacked.norm(dim=1)
        units = stacked / lengths.where(lengths > 0, torch.ones(()))[:, None]
        rows = {layer: i for i, layer in enumerate(vector.layers)}
        stack = _Stack(tuple(vector.layers), rows, stacked, lengths, units, bool((lengths > 0).all()))
        _STACKS[vector] = stack
    return stack


class SlotTable:
    """The slots of one worker: tensors of a fixed size, and which composition holds which slot.

    `added` is [layers, slots, hidden], `units` [layers, K, slots, hidden], `factors` [layers, K, slots, 2]: float32.
    A composition holds its slots while a request with it runs. Afterwards they keep their content until another
    composition needs them, so that the next request of the same arm has nothing to write.
    """

    def __init__(self, layers: Sequence[int], slots: int, hidden: int, directions: int, device: torch.device) -> None:
        self.layers, self.slots, self.hidden, self.directions = tuple(layers), slots, hidden, directions
        self.added = torch.zeros(len(self.layers), slots + 1, hidden, device=device)
        self.units = torch.zeros(len(self.layers), directions, slots + 1, hidden, device=device)
        self.factors = torch.zeros(len(self.layers), directions, slots + 1, 2, device=device)
        self.free = list(range(slots, 0, -1))
        self.projecting: set[int] = set()  # slots that have directions
        self.held: dict[str, list[int]] = {}  # by key: the slot of each phase, 0 where nothing acts
        self.users: dict[str, int] = {}  # by key: the number of running requests
        self.idle: OrderedDict[str, None] = OrderedDict()  # keys without running requests, the longest idle first

    def take(
        self, key: str, composition: Composition, phases: Sequence[Phase], vectors: Mapping[str, SteeringVector]
    ) -> list[int]:
        """The slot of each phase, for one more request with a composition. Raises RuntimeError when no slot is left.

        `key` is the digest of the composition and its vectors, so requests with equal keys share their slots.
        """
        if key not in self.held:
            self.held[key] = self._write(composition, phases, vectors)
            self.users[key] = 0
        self.idle.pop(key, None)
        self.users[key] += 1
        return self.held[key]

    def release(self, key: str) -> None:
        """Give back the slots of one request with this composition."""
        self.users[key] -= 1
        if self.users[key] > 0:
            return
        if any(self.held[key]):
            self.idle[key] = None
        else:  # it never acts (0*warm) and has no slots, so it would never be evicted
            del self.held[key], self.users[key]

    def _write(
        self, composition: Composition, phases: Sequence[Phase], vectors: Mapping[str, SteeringVector]
    ) -> list[int]:
        slots: dict[tuple[int, ...], int] = {(): 0}
        written = [
            (
                terms,
                content_of([composition.terms[i] for i in terms], vectors, self.layers, self.hidden, self.directions),
            )
            for terms in dict.fromkeys(phase.terms for phase in phases)
            if terms
        ]
        while len(self.free) < len(written):
            if not self.idle:
                raise RuntimeError(f"steer: all {self.slots} slots are held, and an admitted request needs more")
            oldest, _ = self.idle.popitem(last=False)
            self.free += {slot for slot in self.held.pop(oldest) if slot}
            del self.users[oldest]
        try:
            for terms, content in written:
                slot = slots[terms] = self.free.pop()
                self.added[:, slot] = content.added.to(self.added.device)
                if content.units.shape[1]:
                    self.projecting.add(slot)
                    self.units[:, :, slot] = content.units.to(self.units.device)
                    self.factors[:, :, slot] = content.factors.to(self.factors.device)
                elif slot in self.projecting:
                    self.units[:, :, slot], self.factors[:, :, slot] = 0, 0
                    self.projecting.discard(slot)
        except BaseException:
            self.free += [slot for slot in slots.values() if slot]  # their content is overwritten at the next use
            raise
        return [slots[phase.terms] for phase in phases]
