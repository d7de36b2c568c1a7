"""Which vectors are loaded in the workers, and how many holds each has: one state machine per digest.

    absent -> loading -> loaded -> unloading -> absent

A name, an upload in progress and a request each take a hold on a vector. One task per digest calls the workers, and it
unloads a vector only when nothing holds it; so a vector in use is never unloaded, in whatever order DELETE, POST and
requests arrive. Everything here runs on the event loop, so no state changes between two awaits.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

INTERVAL = 0.01  # seconds between two questions whether the workers have loaded a vector
Call = Callable[..., Awaitable[Any]]  # vLLM's collective_rpc: calls a method of every worker


class State(enum.Enum):
    """The state of a vector in the workers."""

    ABSENT = "absent"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


@dataclass
class _Vector:
    state: State = State.ABSENT
    holds: int = 0
    content: bytes = b""  # the artifact file, until it is loaded
    task: asyncio.Task[None] | None = None


class Residency:
    """The vectors of one engine's workers, by digest. Before `connect`, and offline, holds are not counted."""

    def __init__(self) -> None:
        self._call: Call | None = None
        self._shared = False
        self._vectors: dict[str, _Vector] = {}

    def connect(self, call: Call, *, shared: bool = False) -> None:
        """Reach the workers through this function (AsyncLLM.collective_rpc), `shared` by several front ends.

        Their vectors are those of the settings, which all need: one front end that fails must not unload them.
        """
        self._call, self._shared = call, shared

    def state(self, digest: str) -> State:
        """The state of a vector."""
        vector = self._vectors.get(digest)
        return vector.state if vector is not None else State.ABSENT

    def hold(self, digests: Iterable[str]) -> None:
        """Hold loaded vectors until `release`. Raises LookupError when one is not loaded; then none is held."""
        if self._call is None:
            return
        digests = list(digests)
        missing = [digest for digest in digests if self.state(digest) is not State.LOADED]
        if missing:
            raise LookupError(f"not loaded in the workers: {', '.join(missing)}")
        for digest in digests:
            self._vectors[digest].holds += 1

    def release(self, digests: Iterable[str]) -> None:
        """Give up one hold on each vector; a vector without holds is unloaded."""
        if self._call is None:
            return
        for digest in digests:
            vector = self._vectors[digest]
            vector.holds -= 1
            if not vector.holds:
                self._settle(digest)

    @contextlib.contextmanager
    def holding(self, digests: Iterable[str]) -> Iterator[None]:
        """A context manager: holds loaded vectors. Raises LookupError when one is not loaded."""
        digests = list(digests)
        self.hold(digests)
        try:
            yield
        finally:
            self.release(digests)

    @contextlib.asynccontextmanager
    async def delivered(self, digest: str, content: bytes) -> AsyncIterator[None]:
        """A context manager: loads and holds the vector with this artifact file. Raises what the workers raise."""
        vector = self._vectors.setdefault(digest, _Vector())
        vector.holds += 1
        if vector.state is not State.LOADED:  # a loaded vector that is held is not loaded again
            vector.content = content
        try:
            while vector.state is not State.LOADED:
                # Other callers may wait for the same task: a client that disconnects must not cancel it.
                await asyncio.shield(self._settle(digest))
            yield
        finally:
            self.release([digest])

    def _settle(self, digest: str) -> asyncio.Task[None]:
        """The task that loads or unloads a vector according to its holds."""
        vector = self._vectors[digest]
        if vector.task is None or vector.task.done():
            vector.task = asyncio.ensure_future(self._drive(digest, vector))
            # Reads the exception, since asyncio complains about one that no caller awaits.
            vector.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return vector.task

    async def _drive(self, digest: str, vector: _Vector) -> None:
        assert self._call is not None
        while True:
            if vector.holds and vector.state is State.ABSENT:
                vector.state = State.LOADING
                try:
                    # The workers decode it in a thread, so that no step waits for it.
                    await self._call("steer_start_loading", args=(digest, vector.content))
                    while not all(await self._call("steer_loaded", args=(digest,))):
                        await asyncio.sleep(INTERVAL)
                    await self._call("steer_use", args=(digest,))
                except BaseException as error:
                    if isinstance(error, Exception) and not self._shared:  # workers that have loaded it drop it again
                        with contextlib.suppress(Exception):
                            await self._call("steer_unload", args=(digest,))
                    vector.state = State.ABSENT
                    if not vector.holds:
                        self._vectors.pop(digest, None)
                    raise
                vector.state, vector.content = State.LOADED, b""
            elif not vector.holds and vector.state is State.LOADED:
                vector.state = State.UNLOADING
                # After a failure a worker may still have the vector; the next load replaces it.
                with contextlib.suppress(Exception):
                    await self._call("steer_unload", args=(digest,))
                vector.state = State.ABSENT
            else:
                break
        if not vector.holds:
            self._vectors.pop(digest, None)
