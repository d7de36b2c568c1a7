"""Sections in the compiled graph: gates that the tokens decide, before the first block.

Where the model looks up its embeddings, one operation sees the ids of a step's tokens. Whether a token lies inside of
thinking, or of a call of tools, is decided by the last marker up to it: among the tokens of its request in this step,
or else by what the tokens before left behind. That is kept by request, on the device; when a request enters the batch,
behind cached or computed tokens, the host sets it from their ids, so it is re-created from the request alone. The
operation opens the gates and chooses slots as `gates` does, on buffers at fixed addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probes.models.markers import Markers, Sequences
from steer.serving.engine.worker.kernels import sectioning
from steer.serving.engine.worker.operators import define, nothing
from steer.serving.engine.worker.transfers import pinned
from vectors.expression import Condition

logger = logging.getLogger("vllm.steer")

LAYER = -1  # where the gates of sections stand in place of a layer
ANSWER, THINKING, OUTSIDE_TOOLS = 0, 1, 2  # modes
MODES = {"answer": ANSWER, "thinking": THINKING, "outside-tools": OUTSIDE_TOOLS}
ACTS, COUNTS, LAST = 1, 4, 8  # what a token does, as in `gates`; and it is its request's last one in this step
IN_THINKING, IN_TOOLS = 1, 2  # bits of what a token lies inside of
KINDS = ((IN_THINKING, 0), (IN_TOOLS, 2))  # each with the place of its two bits of what markers do: begin, and end


class SectionTable:
    """The markers of the model, and where its requests are.

    `markers` int32 [P, M] has the ids of each marker, -1 in front of shorter ones, and `marks` int32 [P] what it begins
    or ends. `states` int32 [rows, M] has, by request, what its last token lies inside of, and the M - 1 last ids.
    """

    def __init__(self, markers: Markers, rows: int, device: torch.device) -> None:
        found: list[tuple[int, tuple[int, ...]]] = []
        for kind, pair in enumerate((markers.thinking, markers.tools)):
            for side, sequences in enumerate(pair):
                found += [(1 << (2 * kind + side), sequence) for sequence in sequences]
        longest = max(len(sequence) for _, sequence in found)
        padded = [[-1] * (longest - len(sequence)) + list(sequence) for _, sequence in found]
        self.pairs = markers.thinking, markers.tools
        self.markers = torch.tensor(padded, dtype=torch.int32, device=device)
        self.marks = torch.tensor([mark for mark, _ in found], dtype=torch.int32, device=device)
        self.states = torch.full((rows, longest), -1, dtype=torch.int32, device=device)

    def enter(self, row: int, ids: Sequence[int]) -> None:
        """Set where a request is behind the tokens that are not computed again."""
        longest = self.states.shape[1]
        last = np.asarray(ids[max(0, len(ids) - longest + 1) :] if longest > 1 else (), dtype=np.int32)
        state = np.full(longest, -1, dtype=np.int32)
        state[longest - len(last) :] = last
        state[0] = self.state_after(ids)
        self.states[row].copy_(pinned(state, self.states.device), non_blocking=True)

    def state_after(self, ids: Sequence[int]) -> int:
        """What the last of these tokens lies inside of."""
        array = np.asarray(ids, dtype=np.int64)
        pairs = zip((IN_THINKING, IN_TOOLS), self.pairs, strict=True)
        return sum(bit for bit, (begins, ends) in pairs if -1 < _last(array, begins) >= _last(array, ends))


def _last(ids: np.ndarray, markers: Sequences) -> int:
    """Where the last of these markers ends, -1 where there is none."""
    last = -1
    for marker in markers:
        count = len(ids) - len(marker) + 1
        if count > 0:
            fits = np.logical_and.reduce([ids[i : i + count] == token for i, token in enumerate(marker)])
            places = np.nonzero(fits)[0]
            last = max(last, int(places[-1]) + len(marker) - 1) if len(places) else last
    return last


def mode_of(section: Condition) -> int:
    """The mode of a gate that is a section."""
    return MODES[section.kind]


def install(model: nn.Module, gates: Any, slots: Tensor, markers: Markers) -> None:
    """Let the gates of a table see the ids where the model looks up its embeddings; `slots` are those of the tokens.

    A model with no place for it has no sections, and its requests are refused.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [
        each
        for each in model.modules()
        if isinstance(each, VocabParallelEmbedding)
        and not isinstance(each, ParallelLMHead)
        and each.embedding_dim == gates.weights.shape[-1]
    ]
    if len(found) == 1:
        join(found[0], gates, slots, SectionTable(markers, len(gates.counts), slots.device))
    else:
        name = type(model).__name__
        logger.warning("steer: %s has %d embeddings of tokens, so @answer and others are refused", name, len(found))


def join(embedding: nn.Module, gates: Any, slots: Tensor, table: SectionTable) -> None:
    """Make an embedding let the gates see the ids first."""
    gates.sections = table
    buffers = {name: getattr(gates, name) for name in ("modes", "ends", "choices", "tokens", "open", "counts")}
    buffers |= {"slots": slots, "markers": table.markers, "marks": table.marks, "states": table.states}
    for name, tensor in buffers.items():
        embedding.register_buffer(f"steer_section_{name}", tensor, persistent=False)
    plain = type(embedding)

    def forward(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.ops.steer.section(
            ids.reshape(-1),
            self.steer_section_markers,
            self.steer_section_marks,
            self.steer_section_modes,
            self.steer_section_ends,
            self.steer_section_choices,
            self.steer_section_tokens,
            self.steer_section_open,
            self.steer_section_states,
            self.steer_section_counts,
            self.steer_section_slots,
        )
        return plain.forward(self, ids, *args, **kwargs)

    embedding.__class__ = type(f"Sectioned{plain.__name__}", (plain,), {"forward": forward})


def _section(
    ids: Tensor,
    markers: Tensor,
    marks: Tensor,
    modes: Tensor,
    ends: Tensor,
    choices: Tensor,
    tokens: Tensor,
    open_gates: Tensor,
    states: Tensor,
    counts: Tensor,
    slots: Tensor,
) -> None:
    """See the ids [tokens] of a step; the tensors are those of GateTable and SectionTable, and the tokens' slots.

    It changes the last four. On a GPU `kernels.sectioning.section` does the same.
    """
    count = min(ids.shape[0], tokens.shape[0])
    plan, row, does, first = tokens[:count].unbind(1)
    if not bool(row.any()):
        return
    ids = ids[:count].to(torch.int32)
    longest = markers.shape[1]
    places = torch.arange(count, dtype=torch.int32)
    before = states.index_select(0, row)
    history = []  # the ids of the tokens, of those before them, and so on
    for back in range(longest):
        at = places - back
        stored = before.gather(1, (longest + at - first).clamp(0, longest - 1).long()[:, None])[:, 0]
        history.append(torch.where(at >= first, ids.index_select(0, at.clamp(min=0)), stored))
    window = torch.stack(history[::-1], dim=1)[:, None]
    completed = ((window == markers) | (markers < 0)).all(-1)  # [tokens, P]
    state = torch.zeros_like(row)
    for bit, shift in KINDS:
        begins, ends_here = (((marks >> (shift + side) & 1) * completed).amax(1) for side in (0, 1))
        last = torch.where((begins | ends_here) != 0, places, -1).cummax(0).values
        begun = begins.index_select(0, last.clamp(min=0))
        inherited = (before[:, 0] & bit) // bit
        state |= torch.where(last >= first, begun, inherited).int() * bit
    is_last = torch.nonzero(does & LAST)[:, 0]
    left = [state, *history[: longest - 1][::-1]]
    states.index_copy_(0, row[is_last].long(), torch.stack(left, dim=1)[is_last])
    bits = open_gates[:count].clone()
    acts, counted = (does & ACTS) != 0, (does & COUNTS) != 0
    touched = torch.zeros_like(acts)
    thinks, calls = (state & IN_THINKING) != 0, (state & IN_TOOLS) != 0
    for k in range(modes.shape[0]):
        where, mode = modes[k].index_select(0, plan).unbind(1)
        opened = torch.where(mode == THINKING, thinks, torch.where(mode == ANSWER, ~thinks, ~calls))
        changes = (where == LAYER) & acts
        bits = torch.where(changes, (bits & ~(1 << k)) | (opened.int() << k), bits)
        touched |= changes
    open_gates[:count].copy_(bits)
    sets = choices.shape[1]
    chosen = choices.view(-1).index_select(0, plan * sets + bits)
    slots[:count].copy_(torch.where(touched, chosen, slots[:count]))
    last_layer, number = ends.index_select(0, plan).unbind(1)
    final = touched & counted & (last_layer == LAYER)
    nobody = torch.zeros_like(row)
    index = torch.where(final, row * counts.shape[1] + number * sets + bits, nobody)
    counts.view(-1).index_add_(0, index, torch.ones_like(index))


define(
    "section(Tensor ids, Tensor markers, Tensor marks, Tensor modes, Tensor ends, Tensor choices, Tensor tokens, "
    "Tensor(a!) open_gates, Tensor(b!) states, Tensor(c!) counts, Tensor(d!) slots) -> ()",
    cuda=sectioning.section,
    cpu=_section,
    shape=nothing,
)
