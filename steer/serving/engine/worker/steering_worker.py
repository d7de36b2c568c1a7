"""In the worker: holds vectors by digest, gives each request its slots, and sets the slot of every token.

The worker does not rely on admission: a request whose steering can't be applied is reported as failed, and the engine
core ends it with an error, so that it is never answered unsteered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from steer.serving.engine import bounds
from steer.serving.engine.phases import Phase, edges, gated_sets, gates, phases
from steer.serving.engine.proving.forms import Proved
from steer.serving.engine.resolved import ResolvedRequest, parsed
from steer.serving.engine.worker import blocks
from steer.serving.engine.worker.gates import ACTS, COLUMNS, COUNTS, DECIDES, GatedRequest, GateTable
from steer.serving.engine.worker.rows import Stack
from steer.serving.engine.worker.sections import LAST
from steer.serving.engine.worker.slots import SlotTable, Unsteerable
from steer.serving.engine.worker.transfers import pinned
from vectors.errors import ExpressionError
from vectors.expression import Composition
from vectors.probe import KIND as PROBE
from vectors.probe import Probe, reading_of
from vectors.steering import SteeringVector


class _Live(NamedTuple):
    """A running steered request: its composition's key, and the first position (`edges`) and slot of each phase.

    Of one with gates also the plan of each phase (0: no gate acts in it) and of its last prompt token (0: nothing is
    decided there).
    """

    key: str
    edges: list[int]
    slots: list[int]
    prompt_length: int = 0
    plans: Sequence[int] = ()
    deciding: int = 0
    gated: GatedRequest | None = None
    has_sections: bool = False


class SteeringWorker:
    """The state of one worker process.

    `token_slots`, int32 [tokens] on the model's device, is the buffer that the blocks read.
    """

    def __init__(
        self, decoder: Mapping[int, Proved], settings: Mapping[str, Any], tokens: int, hidden: int, requests: int = 256
    ) -> None:
        """`decoder` has the decoder blocks in this process; `settings` the rows and directions of the slot table.

        A step has at most so many `tokens`, and at most so many `requests` run at once.
        """
        device = next(parameter.device for block, _ in decoder.values() for parameter in block.parameters())
        sizes = settings["rows"], hidden, settings["directions"]
        self.table = SlotTable(sorted(decoder), *sizes, device, settings.get("steps", 0))
        self.token_slots = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.blocks = {type(block).__name__: form.name for block, form in decoder.values()}  # for reports
        self.gates: GateTable | None = None
        if settings.get("gates"):
            layers = [i for i in sorted(decoder) if settings["gate_layers"] is None or i in settings["gate_layers"]]
            # Preempted requests hold their rows too.
            rows = 4 * max(requests, 16)
            self.gates = GateTable(layers, settings["gates"], settings["rows"], rows, tokens, hidden, device)
        blocks.install(decoder, self.table, self.token_slots, self.gates)
        self.stacks: dict[str, Stack | Probe] = {}  # the loaded vectors and probes, by digest
        self.reader = ThreadPoolExecutor(1, "steer-load")
        self.loading: dict[str, Future[tuple[str, Stack | Probe]]] = {}  # by digest, until `use`
        self.live: dict[str, _Live] = {}
        self.failed: dict[str, str] = {}  # the reason, by id of a request that can't be steered, until it ends
        self.filled = 0  # number of tokens of the last step; the rest of the buffer is 0
        # The last step's requests and the first positions of their last phases, if the slots stay valid; else None.
        self.steady: tuple[list[str], np.ndarray] | None = None
        self.report: dict[str, Any] | None = None  # what the last step applied, for the engine core

    def load(self, content: bytes) -> str:
        """Load a vector from the bytes of its artifact file; return its digest. Raises ArtifactError."""
        digest, stack = self._read(content)
        self.stacks[digest] = stack
        return digest

    def start_loading(self, digest: str, content: bytes) -> None:
        """Read a vector in another thread, while steps go on; once `loaded` everywhere, `use` makes it available."""
        self.loading[digest] = self.reader.submit(self._read, content)

    def loaded(self, digest: str) -> bool:
        """Whether a vector has been read. Raises what reading it raised, RuntimeError for one of another digest."""
        if digest not in self.loading:
            return digest in self.stacks  # another API server of this engine has loaded it meanwhile
        if not self.loading[digest].done():
            return False
        read_digest, _ = self.loading[digest].result()
        if read_digest != digest:
            raise RuntimeError(f"steer: the vector {digest} arrived as {read_digest}")
        return True

    def use(self, digest: str) -> None:
        """Make a vector available that has been read: in all workers between the same two steps."""
        reading = self.loading.pop(digest, None)
        if reading is not None:
            self.stacks[digest] = reading.result()[1]
        elif digest not in self.stacks:  # in use already when another API server of this engine has loaded it
            raise RuntimeError(f"steer: the vector {digest} was not read")

    def unload(self, digest: str) -> None:
        """Unload a vector; running requests keep their slots."""
        self.stacks.pop(digest, None)
        self.loading.pop(digest, None)

    def _read(self, content: bytes) -> tuple[str, Stack | Probe]:
        from vectors import artifact

        file = artifact.decode(content, "the vector")
        if (file.metadata or {}).get("kind") == PROBE:
            return file.digest, Probe.decode(content)
        layers = {int(name.removeprefix("layer.")): tensor for name, tensor in file.tensors.items()}
        vector = SteeringVector(layers, file.metadata or {})
        bounds.measure(vector)  # here, so that no step waits for it when a request begins
        return file.digest, Stack(vector, pinned=self.token_slots.device.type == "cuda")

    def state(self) -> dict[str, Any]:
        """What the worker holds, as JSON values."""
        held = sum(len(self.table.slots_of(key)) for key, users in self.table.users.items() if users)
        return {
            "vectors": sorted(self.stacks),
            "rows": self.table.slots,
            "rows_held": held,
            "requests": len(self.live),
            "gated": len(self.gates.requests) if self.gates is not None else 0,
            "blocks": self.blocks,
        }

    def begin(self, request: str, prompt_length: int, extra: Mapping[str, Any] | None) -> None:
        """Take the slots for a request that begins.

        Raises Unsteerable when no worker can steer it, any other exception for a fault of this worker.
        """
        try:
            resolved = ResolvedRequest.of(extra)
            if resolved is None:
                return
            self._release(request)  # with vLLM's V2 runner, a preempted request begins again
            composition = parsed(resolved.expression)
            missing = [name for name, digest in resolved.vectors.items() if digest not in self.stacks]
            if missing:
                raise Unsteerable(f"this worker has not loaded {', '.join(missing)}, which request {request} needs")
            used = {name: self.stacks[digest] for name, digest in resolved.vectors.items()}
            stacks = {name: each for name, each in used.items() if isinstance(each, Stack)}
            vectors = {name: stack.vector for name, stack in stacks.items()}
            bounds.require_applicable(composition, vectors, self.table.directions, self.table.steps)
            conditions = gates(composition)
            gated = self._gated(request, composition) if conditions else None
        except (RuntimeError, ValueError, LookupError, TypeError, ExpressionError) as error:
            raise Unsteerable(f"steer: {error}") from error
        ordered: Sequence[Phase] = phases(composition)
        new = resolved.key not in self.table.choices
        slots = self.table.take(resolved.key, composition, ordered, stacks)
        try:
            live = _Live(resolved.key, edges(ordered, prompt_length), slots)
            if gated is not None:
                sources = {n: each.vector if isinstance(each, Stack) else each for n, each in used.items()}
                live = self._with_gates(live, composition, sources, prompt_length, gated, new=new)
            self.live[request] = live
        except BaseException:
            self.table.release(resolved.key, forget=new)  # its gates may not be in the table
            raise
        self.steady = None

    def _with_gates(
        self,
        live: _Live,
        composition: Composition,
        sources: Mapping[str, SteeringVector | Probe],
        prompt_length: int,
        gated: GatedRequest,
        *,
        new: bool,
    ) -> _Live:
        """The same with the gates of its composition, which are written where it is `new` in the slot table."""
        assert self.gates is not None
        sets, conditions = gated_sets(composition), gates(composition)
        by_phase = [
            (phase.terms, choices)
            for phase, choices in zip(phases(composition), self.table.choices[live.key], strict=True)
        ]
        if new:
            readings = [None if gate.is_section else reading_of(sources[gate.name], gate.layer) for gate in conditions]
            self.gates.write(composition, {terms: each for terms, each in by_phase if terms in sets}, readings)
        plans = [choices[-1] if terms in sets else 0 for terms, choices in by_phase]
        once = any(gate.kind == "when" for gate in conditions)
        return live._replace(
            prompt_length=prompt_length,
            plans=plans,
            deciding=next((plan for plan in plans if plan), 0) if once else 0,
            gated=gated,
            has_sections=any(gate.is_section for gate in conditions),
        )

    def _gated(self, request: str, composition: Composition) -> GatedRequest:
        """The row of a request with gates. Raises ValueError, LookupError."""
        if self.gates is None or len(gates(composition)) > self.gates.count:
            raise ValueError(f"the composition has {len(gates(composition))} gates, more than this worker")
        if self.gates.sections is None and any(gate.is_section for gate in gates(composition)):
            raise ValueError("this model looks up its tokens where sections can't see them")
        return self.gates.begin(request)

    def place(self, request: str, ids: Sequence[int] | None, computed: int) -> None:
        """Let a request with sections enter the batch behind its first `computed` tokens, which are not computed again.

        Raises Unsteerable for one whose tokens are not known.
        """
        live = self.live.get(request)
        if live is None or not live.has_sections:
            return
        assert self.gates is not None
        assert self.gates.sections is not None
        if ids is None:
            raise Unsteerable("steer: sections need a prompt of tokens, not of embeddings")
        self.gates.sections.enter(self.gates.requests[request].row, ids[:computed])

    def fail(self, request: str, reason: str) -> None:
        """Mark a request that can't be steered: the next steps report it, and the engine core ends it."""
        self.failed[request] = reason
        self.steady = None

    def end(self, requests: Sequence[str] | set[str]) -> None:
        """Give back the slots of requests that have ended; unsteered requests are skipped."""
        for request in requests:
            if self.failed.pop(request, None) is not None:
                self.steady = None
            self._release(request)
            if self.gates is not None:
                self.gates.end(request)

    def _release(self, request: str) -> None:
        live = self.live.pop(request, None)
        if live is not None:
            self.table.release(live.key)
            self.steady = None

    def point(self, requests: list[str], starts: np.ndarray, counts: np.ndarray) -> None:
        """Set the slot of every token of the next step.

        The tokens of the requests lie one after another: request i has `counts[i]` tokens, the first at position
        `starts[i]` of its sequence; both are integers, [requests]. Afterwards `report` holds the key of each request;
        None when nothing is steered.
        """
        total = int(counts.sum())
        if not self.live and not self.failed:
            if self.steady is not None or self.report is not None:
                self.token_slots[: self.filled].zero_()
                self._fill_gates(None)
            self.filled, self.steady, self.report = 0, None, None
            return
        if self.report is not None and self._unchanged(requests, starts, total):
            self.report = {**self.report, "starts": starts.copy()}
            return
        filled = np.zeros(max(total, self.filled), dtype=np.int32)
        gated = np.zeros((total, COLUMNS), dtype=np.int32) if self.gates is not None and self.gates.requests else None
        keys: list[str | None] = []
        last = np.zeros(len(requests), dtype=np.int64)
        offset = 0
        for i, request in enumerate(requests):
            live, count = self.live.get(request), int(counts[i])
            keys.append(live.key if live else None)
            if live is not None:
                start = int(starts[i])
                last[i] = live.edges[-1]
                for phase in range(bisect_right(live.edges, start) - 1, len(live.edges)):
                    # Each phase overwrites the one before from its first position.
                    begin = max(live.edges[phase] - start, 0)
                    if begin >= count:
                        break
                    filled[offset + begin : offset + count] = live.slots[phase]
                    if live.gated is not None and gated is not None:
                        gated[offset + begin : offset + count, 0] = live.plans[phase]
                if live.gated is not None and gated is not None:
                    last[i] = max(last[i], live.gated.counted)
                    _mark(gated[offset : offset + count], live, start, offset)
            offset += count
        self.token_slots[: len(filled)].copy_(pinned(filled, self.token_slots.device), non_blocking=True)
        self.filled = total
        self._fill_gates(gated)
        # The buffer stays right for the next steps only if every request has one token and is in its last phase.
        settled = total == len(requests) and bool((starts >= last).all())
        self.steady = (list(requests), last) if settled else None
        self.report = {"requests": list(requests), "keys": keys, "starts": starts.copy(), "failed": dict(self.failed)}

    def _fill_gates(self, tokens: np.ndarray | None) -> None:
        if self.gates is not None and (tokens is not None or self.gates.filled):
            self.gates.fill(tokens)

    def launched(self) -> None:
        """Add to the report what the gates hold after the step that has been launched, without waiting for it."""
        if self.gates is not None and self.report is not None and self.gates.filled:
            if "gates" in self.report:  # the requests are those of the step before
                rows = self.report["gates"]["rows"]
            else:
                held = self.gates.requests
                rows = [held[name].row if name in held else 0 for name in self.report["requests"]]
            self.report = {**self.report, "gates": {"rows": rows, **self.gates.snapshot()}}

    def _unchanged(self, requests: list[str], starts: np.ndarray, total: int) -> bool:
        """Whether each request has one token, in its last phase, as in the last step: the buffer stays as it is."""
        if self.steady is None or total != len(requests) or self.steady[0] != requests:
            return False
        if not bool((starts >= self.steady[1]).all()):
            return False
        if self.gates is not None and self.gates.filled:
            for request, start in zip(requests, starts.tolist(), strict=True):
                if request in self.gates.requests:
                    self.gates.requests[request].counted = start + 1
        return True


def _mark(tokens: np.ndarray, live: _Live, start: int, offset: int) -> None:
    """Set the row, and what they do, of the tokens of a request with gates: [tokens, 4].

    The first is at position `start` of its sequence, and at `offset` of the step.
    """
    gated, prompt, end = live.gated, live.prompt_length, start + len(tokens)
    assert gated is not None
    tokens[:, 1], tokens[:, 3] = gated.row, offset
    tokens[max(prompt - start, 0) :, 2] = ACTS
    tokens[max(prompt - start, gated.counted - start, 0) :, 2] = ACTS | COUNTS
    if live.deciding and not gated.decided and start <= prompt - 1 < end:
        # A preempted request, whose prompt may be computed once more, stays as it has been decided.
        tokens[prompt - 1 - start, :3] = live.deciding, gated.row, DECIDES
        gated.decided = True
    tokens[-1:, 2] |= LAST
    gated.counted = max(gated.counted, end)
