"""The slot table: what each composition adds to the residual stream, layer by layer, at fixed addresses.

A slot holds, for every layer, what is added (a) and up to K directions (u, with level c and gain g). A token that
points at the slot has its residual stream h changed to

    h + a + sum_k (c_k + g_k <h, u_k>) u_k

Adding v at strength s is a = s v. Ablating it by s is u = v/|v|, g = -s, c = 0; clamping it to x is g = -1, c = x |v|.
All terms read h as it was, so terms along one direction share it. Slot 0 is zero: unsteered.
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

    `factors` holds level and gain. Directions that a layer does not need are zero; where nothing projects, K is 0.
    """

    added: Tensor
    units: Tensor
    factors: Tensor


def directions_needed(composition: Composition, vectors: Mapping[str, SteeringVector]) -> int:
    """The most directions that any layer needs in any phase; an upper bound, since scopes may part them."""
    return max((len(found) for found in _projected(composition.terms, vectors).values()), default=0)


def _projected(terms: Iterable[Term], vectors: Mapping[str, SteeringVector]) -> dict[int, set[str]]:
    """By layer, the names of the vectors along which something is projected."""
    found: dict[int, set[str]] = {}
    for term in terms:
        if term.operation != "add" and acting(term):
            for layer in layers_of(term, vectors[term.name]):
                found.setdefault(layer, set()).add(term.name)
    return found


def layers_of(term: Term, vector: SteeringVector) -> tuple[int, ...]:
    """The layers at which a term acts."""
    return vector.acting(term.layers)


def content_of(
    terms: Sequence[Term], vectors: Mapping[str, SteeringVector], layers: Sequence[int], hidden: int, directions: int
) -> SlotContent:
    """What terms that act together do at the given layers (those of this worker), with `directions` = K.

    Raises ValueError when a layer needs more directions than K; admission refuses such a composition first.
    """
    everywhere = tuple(layers)
    index = {layer: i for i, layer in enumerate(everywhere)}
    count = directions if any(term.operation != "add" for term in terms) else 0
    added = torch.zeros(len(index), hidden)
    units = torch.zeros(len(index), count, hidden)
    factors = torch.zeros(len(index), count, 2)
    places: dict[str, Tensor] = {}  # by name, at every layer: which of the directions, -1 for none
    used = torch.zeros(len(index), dtype=torch.long)
    even: dict[str, int] = {}  # by name: which of the directions, where it is the same at every layer
    for term in terms:
        held, asked = _held(vectors[term.name]), layers_of(term, vectors[term.name])
        gain = -term.value if term.operation == "ablate" else -1.0
        # At all layers there is nothing to index: the same as below, at a tenth of the cost.
        if asked == held.layers == everywhere and term.operation == "add":
            added.add_(held.stacked, alpha=term.value)
            continue
        room = term.name in even or len(even) < directions
        if asked == held.layers == everywhere and held.directed and room and not places:
            if term.name not in even:
                even[term.name] = len(even)
                units[:, even[term.name]] = held.units
            factors[:, even[term.name], 1] += gain
            if term.operation == "clamp":
                factors[:, even[term.name], 0] += term.value * held.lengths
            continue
        if even and not places:
            places = {name: torch.full((len(index),), place) for name, place in even.items()}
            used += len(even)
        # Layers that are not in the index are another worker's, in a pipeline.
        acts = [layer for layer in asked if layer in index]
        at, sources = torch.tensor([index[i] for i in acts]), torch.tensor([held.places[i] for i in acts])
        if not acts:
            continue
        if term.operation == "add":
            added.index_add_(0, at, held.stacked[sources], alpha=term.value)
            continue
        there = held.lengths[sources] > 0  # no direction, no component along it
        at, sources = at[there], sources[there]
        place = places.setdefault(term.name, torch.full((len(index),), -1))
        new = at[place[at] < 0]
        place[new] = used[new]
        used[new] += 1
        if bool((used > directions).any()):
            layer = everywhere[int((used > directions).nonzero()[0])]
            raise ValueError(f"layer {layer} needs more than {directions} directions")
        units[at, place[at]] = held.units[sources]
        factors[at, place[at], 1] += gain
        if term.operation == "clamp":
            factors[at, place[at], 0] += term.value * held.lengths[sources]
    return SlotContent(added, units, factors)


class _Held(NamedTuple):
    """A vector as tensors: `stacked`, `units` [layers, hidden], `lengths` [layers], and where each layer stands."""

    layers: tuple[int, ...]
    places: dict[int, int]
    stacked: Tensor
    lengths: Tensor
    units: Tensor
    directed: bool  # whether every length is above 0


_HELD: weakref.WeakKeyDictionary[SteeringVector, _Held] = weakref.WeakKeyDictionary()


def _held(vector: SteeringVector) -> _Held:
    """Kept while the vector lives: with a tensor a layer, a new composition would take longer than a step."""
    found = _HELD.get(vector)
    if found is None:
        stacked = torch.stack(list(vector.layers.values()))
        lengths = stacked.norm(dim=1)
        units = stacked / lengths.where(lengths > 0, torch.ones(()))[:, None]
        places = {layer: i for i, layer in enumerate(vector.layers)}
        found = _HELD[vector] = _Held(tuple(vector.layers), places, stacked, lengths, units, bool((lengths > 0).all()))
    return found


class SlotTable:
    """The slots of one worker: tensors of a fixed size, and who holds which slot.

    `added` is [layers, slots, hidden], `units` [layers, K, slots, hidden], `factors` [layers, K, slots, 2]: float32.
    A composition holds its slots while a request with it lives; afterwards they stay as they are until another
    composition needs the room, so that the next request of the same arm writes nothing.
    """

    def __init__(self, layers: Sequence[int], slots: int, hidden: int, directions: int, device: torch.device) -> None:
        self.layers, self.slots, self.hidden, self.directions = tuple(layers), slots, hidden, directions
        self.added = torch.zeros(len(self.layers), slots + 1, hidden, device=device)
        self.units = torch.zeros(len(self.layers), directions, slots + 1, hidden, device=device)
        self.factors = torch.zeros(len(self.layers), directions, slots + 1, 2, device=device)
        self.free = list(range(slots, 0, -1))
        self.projecting: set[int] = set()  # slots that have directions
        self.held: dict[str, list[int]] = {}  # key: slot of every phase, 0 where nothing acts
        self.users: dict[str, int] = {}
        self.idle: OrderedDict[str, None] = OrderedDict()  # keys without users, the longest idle first

    def take(
        self, key: str, composition: Composition, found: Sequence[Phase], vectors: Mapping[str, SteeringVector]
    ) -> list[int]:
        """The slot of each phase for one more request of a composition. Raises RuntimeError when no slot is left.

        `key` names the composition with the digests of its vectors, so equal keys have equal slots.
        """
        if key not in self.held:
            self.held[key] = self._write(composition, found, vectors)
            self.users[key] = 0
        self.idle.pop(key, None)
        self.users[key] += 1
        return self.held[key]

    def release(self, key: str) -> None:
        """One request of a composition has ended."""
        self.users[key] -= 1
        if self.users[key] > 0:
            return
        if any(self.held[key]):
            self.idle[key] = None
        else:  # it never acts (0*warm), so there is nothing to keep, and nothing that would ever evict it
            del self.held[key], self.users[key]

    def _write(
        self, composition: Composition, found: Sequence[Phase], vectors: Mapping[str, SteeringVector]
    ) -> list[int]:
        slots: dict[tuple[int, ...], int] = {(): 0}
        written = [
            (
                terms,
                content_of([composition.terms[i] for i in terms], vectors, self.layers, self.hidden, self.directions),
            )
            for terms in dict.fromkeys(phase.terms for phase in found)
            if terms
        ]
        while len(self.free) < len(written):
            if not self.idle:
                raise RuntimeError(
                    f"steer: all {self.slots} slots are held; admitted requests need more than there are"
                )
            oldest, _ = self.idle.popitem(last=False)
            self.free += {slot for slot in self.held.pop(oldest) if slot}
            del self.users[oldest]
        try:
            for terms, content in written:
                at = slots[terms] = self.free.pop()
                self.added[:, at] = content.added.to(self.added.device)
                if content.units.shape[1]:
                    self.projecting.add(at)
                    self.units[:, :, at] = content.units.to(self.units.device)
                    self.factors[:, :, at] = content.factors.to(self.factors.device)
                elif at in self.projecting:
                    self.units[:, :, at], self.factors[:, :, at] = 0, 0
                    self.projecting.discard(at)
        except BaseException:
            self.free += [slot for slot in slots.values() if slot]  # what is in them is overwritten at the next use
            raise
        return [slots[phase.terms] for phase in found]
