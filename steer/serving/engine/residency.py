"""Which vectors the workers hold, and who needs each: one state machine per digest.

    absent -> loading -> loaded -> unloading -> absent

A name, a POST under way and a request each take a hold on a vector. Only one task per digest talks to the workers, and
it unloads a vector that is loaded and that nobody holds, nothing else; so what is needed is never unloaded, however
deletes, posts and requests follow each other. Everything here runs on the event loop; between two awaits nothing moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Call = Callable[..., Awaitable[Any]]  # vLLM's collective_rpc: a method of the workers, and its arguments


class State(enum.Enum):
    """Where a vector is, seen from the workers."""

    ABSENT = "absent"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


@dataclass
class _Vector:
    state: State = State.ABSENT
    holds: int = 0
    content: bytes = b""  # the artifact file, while it is to be sent
    task: asyncio.Task[None] | None = None


class Residency:
    """The vectors of one engine's workers, by digest. Before `connect`, and offline, holds are not checked."""

    def __init__(self) -> None:
        self._call: Call | None = None
        self._vectors: dict[str, _Vector] = {}

    def connect(self, call: Call) -> None:
        """Use this to reach the workers (AsyncLLM.collective_rpc)."""
        self._call = call

    def state(self, digest: str) -> State:
        """Where a vector is."""
        vector = self._vectors.get(digest)
        return vector.state if vector is not None else State.ABSENT

    def hold(self, digests: Iterable[str]) -> None:
        """Need loaded vectors, until `release`. Raises LookupError when one is not loaded: then none is held."""
        if self._call is None:
            return
        digests = list(digests)
        missing = [digest for digest in digests if self.state(digest) is not State.LOADED]
        if missing:
            raise LookupError(f"the workers do not hold {', '.join(missing)}")
        for digest in digests:
            self._vectors[digest].holds += 1

    def release(self, digests: Iterable[str]) -> None:
        """Need vectors no more. Those that nobody holds are unloaded."""
        if self._call is None:
            return
        for digest in digests:
            vector = self._vectors[digest]
            vector.holds -= 1
            if not vector.holds:
                self._settle(digest)

    @contextlib.contextmanager
    def holding(self, digests: Iterable[str]) -> Iterator[None]:
        """Hold loaded vectors within. Raises LookupError."""
        digests = list(digests)
        self.hold(digests)
        try:
            yield
        finally:
            self.release(digests)

    @contextlib.asynccontextmanager
    async def delivered(self, digest: str, content: bytes) -> AsyncIterator[None]:
        """Within, the workers hold the vector whose artifact file has these bytes. Raises what the workers raise."""
        vector = self._vectors.setdefault(digest, _Vector())
        vector.holds += 1
        vector.content = content
        try:
            while vector.state is not State.LOADED:
                # The task is not this caller's alone: a client that hangs up does not end what others wait for.
                await asyncio.shield(self._settle(digest))
            yield
        finally:
            self.release([digest])

    def _settle(self, digest: str) -> asyncio.Task[None]:
        """The task that brings a vector where its holds want it."""
        vector = self._vectors[digest]
        if vector.task is None or vector.task.done():
            vector.task = asyncio.ensure_future(self._drive(digest, vector))
            # A failure is told to those who wait for it; without any, there is nobody to tell.
            vector.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return vector.task

    async def _drive(self, digest: str, vector: _Vector) -> None:
        assert self._call is not None
        while True:
            if vector.holds and vector.state is State.ABSENT:
                vector.state = State.LOADING
                try:
                    answers = await self._call("steer_load", args=(vector.content,))
                    if isinstance(answers, list) and set(answers) != {digest}:
                        raise RuntimeError(f"steer: the workers answered {answers} to the vector {digest}")
                except BaseException:
                    vector.state = State.ABSENT
                    if not vector.holds:
                        self._vectors.pop(digest, None)
                    raise
                vector.state, vector.content = State.LOADED, b""
            elif not vector.holds and vector.state is State.LOADED:
                vector.state = State.UNLOADING
                # What a worker may have kept is overwritten by the next load.
                with contextlib.suppress(Exception):
                    await self._call("steer_unload", args=(digest,))
                vector.state = State.ABSENT
            else:
                break
        if not vector.holds:
            self._vectors.pop(digest, None)
