"""In the engine core: no more compositions in use than there are slots, and a receipt for every request that ends.

A request whose composition finds no free slot waits here, before it reaches the scheduler, in the order of arrival. It
also waits when the next step already has so many slots to write that writing its own would stall the step noticeably.
Unsteered requests never wait. The receipt is counted from the worker's report of what it applied in each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from steer.serving.engine.bounds import GATED_PHASES
from steer.serving.engine.phases import (
    conditions_of,
    counts,
    gated_counts,
    gated_sets,
    gates,
    opens,
    size,
    slots_needed,
)
from steer.serving.engine.resolved import ResolvedRequest, parsed, prompt_length, resolved_of
from vectors.expression import Composition

# The most that the compositions which enter for one step cost together. On 2 cores and a model of 30 layers of 576, a
# unit takes about 20 microseconds.
MOST_COST = 512


def cost(composition: Composition) -> int:
    """What writing the slots of a composition costs: a unit for each vector added to a slot, or copied into it."""
    steps = set(composition.steps)
    projecting = sum(term.operation != "add" or index in steps for index, term in enumerate(composition.terms))
    slots, terms = size(composition)
    return terms + slots * min(projecting, 8)


class _Progress:
    """How far a steered request has come: positions [cached, end) went through the model under its composition."""

    __slots__ = ("cached", "composition", "end", "gates", "prompt_length", "read", "resolved", "terms")

    def __init__(self, resolved: ResolvedRequest, prompt_length: int) -> None:
        self.resolved, self.prompt_length = resolved, prompt_length
        self.cached: int | None = None  # prompt tokens with keys and values in the prefix cache
        self.end = 0
        # What a receipt says of each term, without the counts. A request with stop strings has a receipt at each step.
        self.composition = parsed(resolved.expression)
        self.terms = [
            {"term": str(term), "vector": term.name, "vector_digest": resolved.vectors[term.name]}
            for term in self.composition.terms
        ]
        self.gates = gates(self.composition)
        self.read: tuple[Any, int] | None = None  # what the gates hold after the last step, and its row


class Capacity:
    """The slots that running requests hold, the requests that wait for slots, and what was applied to each request."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.holders: dict[str, int] = {}  # number of running requests, by key of the composition
        self.sizes: dict[str, int] = {}  # number of slots, by key of the composition
        self.spent = 0  # cost of the compositions that have entered since the last step was scheduled
        self.progress: dict[str, _Progress] = {}  # by request id
        self.waiting: deque[Any] = deque()
        self.failed: dict[str, str] = {}  # the reason, by id of a request that must end in an error
        self.stops: set[str] = set()  # ids of requests with stop strings: the front end may end them at any step

    @property
    def held(self) -> int:
        """The number of slots that running requests hold."""
        return sum(self.sizes[key] for key in self.holders)

    def enter(self, request: Any) -> bool:
        """Whether a request (vLLM's) may go to the scheduler now; if not, it is queued here."""
        resolved = resolved_of(request)
        if resolved is None:
            return True
        # First come, first served, even where the composition has its slots already: so no request starves.
        if self.waiting or not self._may_enter(resolved):
            self.waiting.append(request)
            return False
        self._hold(request, resolved)
        return True

    def leave(self, request: str) -> dict[str, Any] | None:
        """Remove a request that has ended; return its receipt, None when it was not steered."""
        progress = self.progress.pop(request, None)
        if progress is None:
            return None
        self.stops.discard(request)
        key = progress.resolved.key
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key], self.sizes[key]
        return self.receipt(progress)

    def next_in(self) -> list[Any]:
        """Take from the queue the requests that may go to the scheduler now, in order of arrival."""
        ready = []
        while self.waiting:
            resolved = resolved_of(self.waiting[0])
            assert resolved is not None
            if not self._may_enter(resolved):
                break
            self._hold(self.waiting[0], resolved)
            ready.append(self.waiting.popleft())
        return ready

    def next_step(self) -> list[Any]:
        """Begin a step: take from the queue the requests that may go to the scheduler for it."""
        self.spent = 0
        return self.next_in()

    def withdraw(self, requests: set[str] | None) -> list[Any]:
        """Take aborted requests, by id, out of the queue; None takes all."""
        withdrawn = [r for r in self.waiting if requests is None or r.request_id in requests]
        self.waiting = deque(r for r in self.waiting if not (requests is None or r.request_id in requests))
        return withdrawn

    def fail(self, failed: Mapping[str, str]) -> dict[str, str]:
        """All requests that must end in an error, with the reason, given those that a worker failed to steer in a step.

        Running requests with the same composition, or the same one on the prompt, are among them: they may have reused
        the unsteered keys and values of the failed request from the prefix cache.
        """
        keys: dict[str | None, str] = {}
        for name, why in failed.items():
            if name in self.progress:
                resolved = self.progress[name].resolved
                keys |= {resolved.key: why, resolved.prompt_key: why}
        keys.pop(None, None)
        shared = {
            name: keys[p.resolved.key if p.resolved.key in keys else p.resolved.prompt_key]
            for name, p in self.progress.items()
            if keys and not keys.keys().isdisjoint((p.resolved.key, p.resolved.prompt_key))
        }
        result = {**self.failed, **failed, **shared}
        self.failed = {}
        return result

    def record(self, scheduled: Mapping[str, int], report: Mapping[str, Any] | None) -> dict[str, str]:
        """Record what a step applied: the number of `scheduled` tokens by request id, and the worker's report.

        Returns the steered requests that must end in an error, with the reason: those that the worker could not steer,
        and those that ran without their composition, so that they are never answered.
        """
        failed: dict[str, str] = dict((report or {}).get("failed", {}))
        steered = [request for request in scheduled if request in self.progress and request not in failed]
        applied = _by_request(report) if report is not None and steered else {}
        read = (report or {}).get("gates")
        rows = dict(zip(report["requests"], read["rows"], strict=True)) if report and read else {}
        for request in steered:
            progress = self.progress[request]
            key, start = applied.get(request, (None, 0))
            if key != progress.resolved.key:
                failed[request] = f"steer: it ran without its composition {progress.resolved.expression[:80]}"
                continue
            if progress.cached is None:
                progress.cached = int(start)
            progress.end = max(progress.end, int(start) + scheduled[request])
            if progress.gates and read:
                progress.read = read, rows[request]
        return failed

    def receipt(self, progress: _Progress) -> dict[str, Any]:
        """The receipt so far: each term, and the number of tokens it acted on.

        A token counts when its position went through the model. The last token of a response never does.
        """
        applied = counts(progress.composition, progress.prompt_length, progress.end)
        receipt: dict[str, Any] = {
            "digest": progress.resolved.key,
            "expression": progress.resolved.expression,
            "prompt_tokens": min(progress.end, progress.prompt_length),
            "cached_tokens": min(progress.cached or 0, progress.end),
            "response_tokens": max(0, progress.end - progress.prompt_length),
            "terms": [
                {**term, "prompt_tokens": prompt, "response_tokens": response}
                for term, (prompt, response) in zip(progress.terms, applied, strict=True)
            ],
        }
        if progress.gates:
            _add_gates(receipt, progress)
        return receipt

    def state(self) -> dict[str, int]:
        """The numbers of slots and of waiting requests, for the metrics."""
        return {"rows": self.slots, "rows_held": self.held, "waiting": len(self.waiting)}

    def _may_enter(self, resolved: ResolvedRequest) -> bool:
        """Whether there are slots for a composition, and this step can still wait while they are written."""
        if resolved.key in self.holders:
            return True
        composition = parsed(resolved.expression)
        fits = self.held + slots_needed(composition) <= self.slots
        # One may always enter; it is for this one that the terms and phases of a composition are bounded.
        return fits and (not self.spent or self.spent + cost(composition) <= MOST_COST)

    def _hold(self, request: Any, resolved: ResolvedRequest) -> None:
        if resolved.key not in self.holders:
            composition = parsed(resolved.expression)
            self.holders[resolved.key] = 0
            self.sizes[resolved.key] = slots_needed(composition)
            self.spent += cost(composition)
        self.holders[resolved.key] += 1
        self.progress[request.request_id] = _Progress(resolved, prompt_length(request))
        if request.sampling_params.stop:
            self.stops.add(request.request_id)


def _by_request(report: Mapping[str, Any]) -> dict[str, tuple[str | None, int]]:
    """A worker's report by request id: the key it ran under (None: unsteered), and the first position of the step."""
    steps = zip(report["keys"], report["starts"], strict=True)
    return dict(zip(report["requests"], steps, strict=True))


def _add_gates(receipt: dict[str, Any], progress: _Progress) -> None:
    """Add to a receipt what its conditions read and decided, and set the numbers of tokens that their terms acted on.

    Of a condition that is decided once (@when), `value` was read, and it held (1) or not (0). Of one that each token in
    the scopes of its terms decides (@while), `value` is the mean of what was `read`, and it `held` for so many tokens;
    a section has no value.
    """
    composition = progress.composition
    values = [0.0] * len(progress.gates)
    by_phase: list[list[int]] = [[]]
    if progress.read is not None:
        held_by_gates, row = progress.read
        values = held_by_gates["values"][:, row].tolist()
        by_phase = held_by_gates["counts"][row].reshape(GATED_PHASES, -1).tolist()
    for t, tokens in gated_counts(composition, by_phase).items():
        receipt["terms"][t]["response_tokens"] = tokens
    sets = gated_sets(composition)
    decided = progress.read is not None and progress.end >= progress.prompt_length
    receipt["gates"] = []
    for k, gate in enumerate(progress.gates):
        if gate.kind == "when":
            value = values[k] if decided else None
            held, read = int(value is not None and opens(gate, value)), int(decided)
        else:
            # By set of open gates, the tokens in the scopes of the terms that have this gate.
            read_by = [n for terms, n in zip(sets, by_phase, strict=False) if gate in conditions_of(composition, terms)]
            read = sum(map(sum, read_by))
            value = values[k] / read if read and not gate.is_section else None
            held = sum(number for phase in read_by for s, number in enumerate(phase) if s >> k & 1)
        names = {"condition": str(gate), "probe": gate.name or gate.kind}
        if not gate.is_section:
            names["digest"] = progress.resolved.vectors[gate.name]
        receipt["gates"].append({**names, "value": value, "held": held, "read": read})
