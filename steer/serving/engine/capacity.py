"""In the engine core: no more compositions live than there are slots, and a receipt for every request that ends.

A request whose composition finds no room waits here, before the scheduler knows it, in the order of arrival; requests
that are not steered pass. The receipt is counted from what the worker reports, step by step, that it applied.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

from steer.serving.engine.phases import counts, slots_needed
from steer.serving.engine.resolved import ResolvedRequest, resolved_of
from vectors.expression import parse

# Cached, because a request with stop strings has a receipt made at every step.
_parsed = functools.lru_cache(1024)(parse)


class _Progress:
    """How far a steered request has come: its key, and the positions [cached, end) that went through the model."""

    __slots__ = ("cached", "end", "prompt_length", "resolved")

    def __init__(self, resolved: ResolvedRequest, prompt_length: int) -> None:
        self.resolved, self.prompt_length = resolved, prompt_length
        self.cached: int | None = None  # tokens whose keys and values were there already, under the same composition
        self.end = 0


class Capacity:
    """The slots that live requests hold, those who wait for one, and what was applied to each."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.holders: dict[str, int] = {}  # requests by key
        self.sizes: dict[str, int] = {}  # slots by key
        self.progress: dict[str, _Progress] = {}  # by request
        self.waiting: deque[Any] = deque()
        self.failed: dict[str, str] = {}  # why, by request that must not be answered
        self.stops: set[str] = set()  # requests that the front end may end, by a stop string

    @property
    def held(self) -> int:
        """Rows that live requests hold."""
        return sum(self.sizes[key] for key in self.holders)

    def enter(self, request: Any) -> bool:
        """Whether a request (vLLM's) may go on to the scheduler now; if not, it waits here."""
        resolved = resolved_of(request)
        if resolved is None:
            return True
        # In order: whoever comes later waits behind, even for a composition that lives, so that nobody starves.
        if self.waiting or not self._fits(resolved):
            self.waiting.append(request)
            return False
        self._hold(request, resolved)
        return True

    def leave(self, request: str) -> dict[str, Any] | None:
        """A request has ended: its receipt, None when it was not steered."""
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
        """The waiting requests that may go on now, in their order."""
        ready = []
        while self.waiting:
            resolved = resolved_of(self.waiting[0])
            assert resolved is not None
            if not self._fits(resolved):
                break
            self._hold(self.waiting[0], resolved)
            ready.append(self.waiting.popleft())
        return ready

    def withdraw(self, requests: set[str] | None) -> list[Any]:
        """Take waiting requests out of the queue, because they are aborted; None takes all."""
        out = [r for r in self.waiting if requests is None or r.request_id in requests]
        self.waiting = deque(r for r in self.waiting if not (requests is None or r.request_id in requests))
        return out

    def fail(self, failed: Mapping[str, str]) -> dict[str, str]:
        """The requests that a step ran, with why, that must end in an error, given those that a worker could not steer.

        With a request go all of the same composition: they may have found its keys and values in the prefix cache.
        """
        keys = {self.progress[name].resolved.key: why for name, why in failed.items() if name in self.progress}
        shared = {name: keys[p.resolved.key] for name, p in self.progress.items() if p.resolved.key in keys}
        result = {**self.failed, **failed, **shared}
        self.failed = {}
        return result

    def record(self, scheduled: Mapping[str, int], report: Mapping[str, Any] | None) -> None:
        """Take in what a step applied: `scheduled` tokens by request, and the worker's report of where it pointed them.

        Raises RuntimeError when a request that is steered ran without its composition: it must not be answered.
        """
        steered = [request for request in scheduled if request in self.progress]
        if not steered:
            return
        applied = {} if report is None else _by_request(report)
        for request in steered:
            progress = self.progress[request]
            key, start = applied.get(request, (None, 0))
            if key != progress.resolved.key:
                raise RuntimeError(
                    f"steer: request {request} ran without its composition {progress.resolved.expression}"
                )
            if progress.cached is None:
                progress.cached = int(start)
            progress.end = max(progress.end, int(start) + scheduled[request])

    def receipt(self, progress: _Progress) -> dict[str, Any]:
        """What was applied, on how many tokens. A token counts when its own position went through the model, so the
        last token of a response, which nothing follows, does not."""
        composition = _parsed(progress.resolved.expression)
        applied = counts(composition, progress.prompt_length, progress.end)
        return {
            "digest": progress.resolved.key,
            "expression": progress.resolved.expression,
            "prompt_tokens": min(progress.end, progress.prompt_length),
            "cached_tokens": min(progress.cached or 0, progress.end),
            "response_tokens": max(0, progress.end - progress.prompt_length),
            "terms": [
                {
                    "term": str(term),
                    "vector": term.name,
                    "vector_digest": progress.resolved.vectors[term.name],
                    "prompt_tokens": prompt,
                    "response_tokens": response,
                }
                for term, (prompt, response) in zip(composition.terms, applied, strict=True)
            ],
        }

    def state(self) -> dict[str, int]:
        """Figures for the metrics."""
        return {"rows": self.slots, "rows_held": self.held, "waiting": len(self.waiting)}

    def _fits(self, resolved: ResolvedRequest) -> bool:
        return resolved.key in self.holders or self.held + slots_needed(_parsed(resolved.expression)) <= self.slots

    def _hold(self, request: Any, resolved: ResolvedRequest) -> None:
        if resolved.key not in self.holders:
            self.holders[resolved.key] = 0
            self.sizes[resolved.key] = slots_needed(_parsed(resolved.expression))
        self.holders[resolved.key] += 1
        self.progress[request.request_id] = _Progress(resolved, request.num_prompt_tokens)
        if request.sampling_params.stop:
            self.stops.add(request.request_id)


def _by_request(report: Mapping[str, Any]) -> dict[str, tuple[str | None, int]]:
    """From a worker's report, by request: the key it ran under, and the position it went on from."""
    steps = zip(report["keys"], report["starts"], strict=True)
    return dict(zip(report["requests"], steps, strict=True))
