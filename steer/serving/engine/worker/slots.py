"""The slot table: what each composition adds to the residual stream, layer by layer, at fixed addresses.

A slot holds, for every layer, a vector to add (a) and up to K directions (u, each with level c and gain g). For a token
with this slot, the residual stream h becomes

    h + a + sum_k (c_k + g_k <h, u_k>) u_k

Adding v at strength s is a = s v. Ablating it by s is u = v/|v|, g = -s, c = 0; ablating it to the mean m |v| is
c = s m |v|; clamping it to x is g = -1, c = x |v|. All these terms read h before any change, so terms along the same
direction share one u. Shares, rotations, and what stands behind a rotation are steps, which follow (`steps`). Slot 0 is
zero: unsteered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from steer.serving.engine.phases import Phase, variants
from steer.serving.engine.worker.rows import Rows, Stack, rows_of
from steer.serving.engine.worker.steps import FACTORS, table_of
from steer.serving.engine.worker.transfers import to_device
from vectors.expression import Composition


class Unsteerable(RuntimeError):
    """Why a request can't be steered, where every worker of an engine comes to the same result.

    It follows from what all workers have alike: the request, the vectors in use, and the slots in use.
    """


class SlotTable:
    """The slots of one worker: tensors of a fixed size, and which composition holds which slot.

    `added` is [layers, slots, hidden], `units` [layers, K, slots, hidden], `factors` [layers, K, slots, 2], and of S
    steps `step_units` [layers, S, slots, hidden] and `step_factors` [layers, S, slots, 6]: float32.
    A composition holds its slots while a request with it runs. Afterwards they keep their content until another
    composition needs them, so that the next request of the same arm has nothing to write.
    """

    def __init__(
        self,
        layers: Sequence[int],
        slots: int,
        hidden: int,
        directions: int,
        device: torch.device,
        steps: int = 0,
    ) -> None:
        self.layers, self.slots, self.hidden, self.directions = tuple(layers), slots, hidden, directions
        self.steps = steps
        self.added = torch.zeros(len(self.layers), slots + 1, hidden, device=device)
        self.units = torch.zeros(len(self.layers), directions, slots + 1, hidden, device=device)
        self.factors = torch.zeros(len(self.layers), directions, slots + 1, 2, device=device)
        self.step_units, self.step_factors = table_of(len(self.layers), steps, slots + 1, hidden, device)
        self.free = list(range(slots, 0, -1))
        self.projecting: set[int] = set()  # slots that have directions
        self.stepping: set[int] = set()  # slots that have steps
        self.choices: dict[str, list[tuple[int, ...]]] = {}  # by key: the slots of each phase, by set of open gates
        self.users: dict[str, int] = {}  # by key: the number of running requests
        self.idle: OrderedDict[str, None] = OrderedDict()  # keys without running requests, the longest idle first
        self.spare = 0  # number of slots of the idle compositions

    def take(
        self, key: str, composition: Composition, phases: Sequence[Phase], stacks: Mapping[str, Stack]
    ) -> list[int]:
        """The slot of each phase while its gates are closed, for one more request with a composition.

        All slots of each phase are in `choices`. `key` is the digest of the composition and its vectors, so requests
        with equal keys share their slots. Raises Unsteerable when no slot is left; then nothing has changed.
        """
        if key not in self.choices:
            self.choices[key] = self._write(composition, phases, stacks)
            self.users[key] = 0
        if key in self.idle:
            del self.idle[key]
            self.spare -= len(self.slots_of(key))
        self.users[key] += 1
        return [choices[0] for choices in self.choices[key]]

    def release(self, key: str, *, forget: bool = False) -> None:
        """Give back the slots of one request with this composition; `forget` what they hold if it was the last one."""
        self.users[key] -= 1
        if self.users[key] > 0:
            return
        self.idle[key] = None
        self.spare += len(self.slots_of(key))
        if forget or not self.slots_of(key):  # what never acts (0*warm) would never be evicted
            self._forget(key)

    def _forget(self, key: str) -> None:
        """Free the slots of an idle composition, so that the next request with it writes them again."""
        slots = self.slots_of(key)
        del self.idle[key], self.choices[key], self.users[key]
        self.spare -= len(slots)
        self.free += sorted(slots)

    def slots_of(self, key: str) -> set[int]:
        """All slots of a composition."""
        return {slot for choices in self.choices[key] for slot in choices} - {0}

    def _write(
        self, composition: Composition, phases: Sequence[Phase], stacks: Mapping[str, Stack]
    ) -> list[tuple[int, ...]]:
        by_phase = [variants(composition, phase.terms) for phase in phases]
        sets = list(dict.fromkeys(terms for each in by_phase for terms in each if terms))
        if not sets:
            return [(0,) * len(each) for each in by_phase]
        slots = self._free_slots(len(sets))
        try:
            device = self.added.device
            rows = rows_of(composition, sets, stacks, self.layers, self.hidden, self.directions, device, self.steps)
            self._copy(rows, slots)
        except BaseException:
            self.free += slots  # their content is overwritten at the next use
            raise
        slot = dict(zip(sets, slots, strict=True))
        return [tuple(slot.get(terms, 0) for terms in each) for each in by_phase]

    def _free_slots(self, count: int) -> list[int]:
        """Take free slots, evicting the compositions that are idle the longest. Raises Unsteerable."""
        if len(self.free) + self.spare < count:
            raise Unsteerable(f"steer: all {self.slots} slots are held, and an admitted request needs more")
        while len(self.free) < count:
            self._forget(next(iter(self.idle)))
        taken, self.free = self.free[-count:][::-1], self.free[:-count]
        return taken

    def _copy(self, rows: Rows, slots: list[int]) -> None:
        """Write the slots: one copy for each tensor of the table."""
        index = to_device(slots, self.added.device)
        self.added.index_copy_(1, index, rows.added.transpose(0, 1))
        _replace(self.units, self.factors, rows.units, rows.factors, slots, index, self.projecting)
        _replace(self.step_units, self.step_factors, rows.step_units, rows.step_factors, slots, index, self.stepping)


def _replace(
    units: torch.Tensor,
    factors: torch.Tensor,
    new_units: torch.Tensor | None,
    new_factors: torch.Tensor | None,
    slots: list[int],
    index: torch.Tensor,
    filled: set[int],
) -> None:
    """Write units and factors of slots, None for none, into those of a table; `filled` are the slots that have any.

    `index` are the slots, on the device.
    """
    if new_units is None or new_factors is None:
        if not filled.isdisjoint(slots):
            units.index_fill_(2, index, 0)
            factors.index_fill_(2, index, 0)
            filled.difference_update(slots)
        return
    filled.update(slots)
    shape = (*new_units.shape[:2], len(slots), new_units.shape[-1])
    units.index_copy_(2, index, new_units[:, :, None].expand(shape))
    factors.index_copy_(2, index, new_factors)


def table_bytes(layers: int, slots: int, hidden: int, directions: int, steps: int = 0) -> int:
    """The bytes that the tensors of a table take, over all workers."""
    return 4 * layers * (slots + 1) * (hidden + directions * (hidden + 2) + steps * (hidden + FACTORS))
