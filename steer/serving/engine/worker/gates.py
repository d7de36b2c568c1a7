"""Gates in the compiled graph: a reading of the stream chooses the slot that a token reads at the layers above it.

At each layer that a probe may read, one operation computes the score of every token whose composition has a gate there,
and writes the slot of the token: that of the gated terms, or that without them. It runs on the device alone, on buffers
at fixed addresses, and declares what it changes, so torch.compile keeps its order and CUDA graphs replay it.

A gate that is decided once is decided by the last token of the prompt, whose score is stored in the row of its request;
the tokens of the response read it there, in the same step or in later ones. The other gates are decided by each token
of the response for itself. Slots that differ in a gate are equal up to the layer that the gate reads, so it does not
matter what a token's slot is there before the gate has been decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steer.serving.engine.bounds import GATED_PHASES
from steer.serving.engine.phases import conditions_of, gated_sets, gates
from steer.serving.engine.worker import sections
from steer.serving.engine.worker.kernels import gating
from steer.serving.engine.worker.operators import define, nothing
from steer.serving.engine.worker.transfers import pinned, to_device
from vectors.expression import Composition, Condition
from vectors.probe import Readout

Reading = tuple[int, Readout]  # a layer, and what is read there

# What a token does: gates choose its slot, it decides, it is computed for the first time.
ACTS, DECIDES, COUNTS = 1, 2, 4
# A gate is decided once; it is open below the threshold, not above; it is open at the threshold too.
ONCE, BELOW, EQUAL = 1, 2, 4
_MODES = {">": 0, ">=": EQUAL, "<": BELOW, "<=": BELOW | EQUAL}
COLUMNS = 4  # of a token: its plan, its row, what it does, and where the tokens of its request begin in the step


@dataclass
class GatedRequest:
    """What the worker keeps of a request from its first step until it has ended, whatever preempts it in between."""

    row: int
    decided: bool = False  # whether its last prompt token has gone through the model
    counted: int = 0  # the positions before this one went through the model


class _Plan(NamedTuple):
    """The gates of a composition in one of its phases, as GateTable holds them at a slot."""

    weights: list[Tensor]
    limits: list[list[float]]
    modes: list[list[int]]
    end: list[int]
    choices: list[int]


class _Gate(NamedTuple):
    """A gate in one phase of a composition: where and how it reads, and what; of a section, weight None."""

    layer: int
    mode: int
    weight: Tensor | None = None
    bias: float = 0.0
    threshold: float = 0.0


_UNUSED = _Gate(-2, 0)  # below every layer, and below that of sections


def _gate_of(condition: Condition, reading: Reading | None) -> _Gate:
    if reading is None:
        return _Gate(sections.LAYER, sections.mode_of(condition))
    layer, readout = reading
    mode = _MODES[condition.comparison] | (ONCE if condition.kind == "when" else 0)
    return _Gate(layer, mode, readout.weight, readout.bias, condition.threshold)


class GateTable:
    """The gates of the compositions in use, by slot; of the tokens of a step; and of the requests, by row.

    `count` is how many gates one composition may have, `layers` where they may read. A composition's gates are written
    at the slots that its phases have while all gates are open: the `plan` of a token names this slot, 0 none. Row 0 of
    the requests belongs to none.
    """

    def __init__(
        self,
        layers: Sequence[int],
        count: int,
        slots: int,
        requests: int,
        tokens: int,
        hidden: int,
        device: torch.device,
    ) -> None:
        self.layers, self.count = tuple(layers), count
        self.sections: sections.SectionTable | None = None  # where the model has markers
        self.weights = torch.zeros(count, slots + 1, hidden, device=device)
        self.limits = torch.zeros(count, slots + 1, 2, device=device)  # bias, threshold
        self.modes = torch.full((count, slots + 1, 2), _UNUSED.layer, dtype=torch.int32, device=device)  # layer, mode
        self.ends = torch.full((slots + 1, 2), _UNUSED.layer, dtype=torch.int32, device=device)  # highest layer, bin
        self.choices = torch.zeros(
            slots + 1, 1 << count, dtype=torch.int32, device=device
        )  # slot, by set of open gates
        self.tokens = torch.zeros(tokens, COLUMNS, dtype=torch.int32, device=device)
        self.open = torch.zeros(tokens, dtype=torch.int32, device=device)  # the set of open gates
        self.values = torch.zeros(count, requests + 1, device=device)  # the score, or the sum of the tokens' scores
        self.counts = torch.zeros(requests + 1, GATED_PHASES << count, dtype=torch.int32, device=device)
        self.unwritten: dict[int, _Plan] = {}  # by slot: the gates that are written before the next step
        self.fresh: list[int] = []  # rows that are emptied before the next step
        self.requests: dict[str, GatedRequest] = {}
        self.free = list(range(requests, 0, -1))
        self.filled = 0  # the tokens that are not zero lie before this one

    def write(
        self,
        composition: Composition,
        choices: Mapping[tuple[int, ...], Sequence[int]],
        readings: Sequence[Reading | None],
    ) -> None:
        """Write the gates of a composition before the next step.

        `choices` are its slots by set of terms and by set of open gates; `readings` are what its gates read, in order,
        None for sections.
        """
        nothing = torch.zeros(self.weights.shape[-1])
        conditions = gates(composition)
        for number, terms in enumerate(gated_sets(composition)):
            needed = conditions_of(composition, terms)
            # Gates that are decided once are decided in one of the phases; the others only where a term has them.
            here = [
                each if gate.kind == "when" or gate in needed else _UNUSED
                for gate, each in zip(conditions, map(_gate_of, conditions, readings), strict=True)
            ]
            here += [_UNUSED] * (self.count - len(conditions))
            slots = choices[terms]
            self.unwritten[slots[-1]] = _Plan(
                [nothing if each.weight is None else each.weight for each in here],
                [[each.bias, each.threshold] for each in here],
                [[each.layer, each.mode] for each in here],
                [max(each.layer for each in here), number],
                # A composition with fewer gates ignores the bits of the others.
                [slots[each % len(slots)] for each in range(1 << self.count)],
            )

    def flush(self) -> None:
        """Write all gates and empty all rows that are new since the last step: one copy for each tensor."""
        device = self.tokens.device
        if self.fresh:
            rows = to_device(self.fresh, device)
            self.values.index_fill_(1, rows, 0)
            self.counts.index_fill_(0, rows, 0)
            self.fresh = []
        if self.unwritten:
            plans, written = to_device(list(self.unwritten), device), list(self.unwritten.values())
            weights = torch.stack([torch.stack(plan.weights) for plan in written], dim=1)
            self.weights.index_copy_(1, plans, to_device(weights, device))
            limits = torch.tensor([plan.limits for plan in written])
            self.limits.index_copy_(1, plans, to_device(limits.transpose(0, 1), device))
            integers = (
                torch.tensor(values, dtype=torch.int32) for values in zip(*(p[2:] for p in written), strict=True)
            )
            modes, ends, choices = integers
            self.modes.index_copy_(1, plans, to_device(modes.transpose(0, 1), device))
            self.ends.index_copy_(0, plans, to_device(ends, device))
            self.choices.index_copy_(0, plans, to_device(choices, device))
            self.unwritten = {}

    def join(self, block: nn.Module, layer: int) -> None:
        """Let `read` find the tensors of this table at a block."""
        block.__dict__["steer_layer"] = layer
        for name in ("weights", "limits", "modes", "ends", "choices", "tokens", "open", "values", "counts"):
            block.register_buffer(f"steer_gate_{name}", getattr(self, name), persistent=False)

    def begin(self, request: str) -> GatedRequest:
        """The row of a request; the one that it has, where it was preempted. Raises LookupError when none is free."""
        if request not in self.requests:
            if not self.free:
                raise LookupError(f"all {len(self.requests)} rows of gated requests are held")
            gated = self.requests[request] = GatedRequest(self.free.pop())
            self.fresh.append(gated.row)
        return self.requests[request]

    def end(self, request: str) -> None:
        """Free the row of a request that has ended."""
        gated = self.requests.pop(request, None)
        if gated is not None:
            self.free.append(gated.row)

    def fill(self, tokens: np.ndarray | None) -> None:
        """Set what the tokens of the next step do: int32 [tokens, 4]; None for a step without gated requests."""
        self.flush()
        length = 0 if tokens is None else len(tokens)
        if tokens is not None:
            self.tokens[:length].copy_(pinned(tokens, self.tokens.device), non_blocking=True)
        if self.filled > length:
            self.tokens[length : self.filled].zero_()
        self.filled = length

    def snapshot(self) -> dict[str, Any]:
        """What the rows hold after the step that has been launched: on a GPU, once its tokens have arrived."""
        rows = 1 + max((gated.row for gated in self.requests.values()), default=0)
        return {"values": _copy(self.values[:, :rows]), "counts": _copy(self.counts[:rows])}


def _copy(tensor: Tensor) -> np.ndarray:
    if tensor.device.type != "cuda":
        return tensor.clone().numpy()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True).numpy()


def read(block: Any, half: Tensor, other: Tensor | None, slots: Tensor) -> None:
    """Let the gates of a block that has joined a table read the stream, and change the `slots`.

    The stream is `half`, or `half + other`, [tokens, hidden] each.
    """
    torch.ops.steer.gate(
        half,
        other,
        block.steer_layer,
        block.steer_gate_weights,
        block.steer_gate_limits,
        block.steer_gate_modes,
        block.steer_gate_ends,
        block.steer_gate_choices,
        block.steer_gate_tokens,
        block.steer_gate_open,
        block.steer_gate_values,
        block.steer_gate_counts,
        slots,
    )


def _gate(
    half: Tensor,
    other: Tensor | None,
    layer: int,
    weights: Tensor,
    limits: Tensor,
    modes: Tensor,
    ends: Tensor,
    choices: Tensor,
    tokens: Tensor,
    open_gates: Tensor,
    values: Tensor,
    counts: Tensor,
    slots: Tensor,
) -> None:
    """Read the stream at a layer, in the model's dtype; the tensors are those of GateTable, and the tokens' slots.

    It changes the last four. On a GPU `kernels.gating.gate` does the same.
    """
    count = half.shape[0]
    plan, row, does, _ = tokens[:count].unbind(1)
    if not bool(plan.any()):
        return
    stream = (half if other is None else half + other).to(torch.float32)
    acts, counted = (does & ACTS) != 0, (does & COUNTS) != 0
    nobody = torch.zeros_like(row)
    bits = open_gates[:count].clone()
    touched = torch.zeros_like(acts)
    for k in range(weights.shape[0]):
        where, mode = modes[k].index_select(0, plan).unbind(1)
        bias, threshold = limits[k].index_select(0, plan).unbind(1)
        here, once = where == layer, (mode & ONCE) != 0
        score = (stream * weights[k].index_select(0, plan)).sum(-1) + bias
        # Others write to row 0, which nothing reads.
        deciding = torch.where(here & once & ((does & DECIDES) != 0), row, nobody)
        values[k].index_copy_(0, deciding.long(), score)
        values[k].index_add_(0, torch.where(here & ~once & counted, row, nobody), score)
        value = torch.where(once, values[k].index_select(0, row), score)
        beyond = torch.where((mode & BELOW) != 0, value < threshold, value > threshold)
        opened = beyond | (((mode & EQUAL) != 0) & (value == threshold))
        changes = here & acts
        bits = torch.where(changes, (bits & ~(1 << k)) | (opened.int() << k), bits)
        touched |= changes
    open_gates[:count].copy_(bits)
    sets = choices.shape[1]
    chosen = choices.view(-1).index_select(0, plan * sets + bits)
    slots[:count].copy_(torch.where(touched, chosen, slots[:count]))
    last, number = ends.index_select(0, plan).unbind(1)
    final = touched & counted & (last == layer)
    places = torch.where(final, row * counts.shape[1] + number * sets + bits, nobody)
    counts.view(-1).index_add_(0, places, torch.ones_like(places))


define(
    "gate(Tensor half, Tensor? other, int layer, Tensor weights, Tensor limits, Tensor modes, Tensor ends, "
    "Tensor choices, Tensor tokens, Tensor(a!) open_gates, Tensor(b!) values, Tensor(c!) counts, Tensor(d!) slots"
    ") -> ()",
    cuda=gating.gate,
    cpu=_gate,
    shape=nothing,
)
