"""Threads that work on pieces of tensors; results are returned in the order of the pieces."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Start function(*arguments) in a daemon thread; returns the future of its result."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name=f"merge-{function.__name__}").start()
    return future


class Pool:
    """A pool with a thread for each core. The inner loops release the GIL, so threads suffice."""

    def __init__(self, threads: int | None = None, device: Any = None) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        self.device = device  # a torch.device that computes instead of the threads, or None
        self.executor = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        self.local = threading.local()
        self.tables: dict[tuple[tuple[int, ...], Any], list[Any]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: Any = float) -> Any:
        """Scratch memory of the current thread, reused for the next piece; its content is undefined."""
        size = math.prod(shape)
        buffer = self.local.__dict__.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            import numpy as np

            buffer = self.local.__dict__[name] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)

    def zeroed(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of zeros, reused from `give_back` if possible, because new memory is slow."""
        import numpy as np

        free = self.tables.get((shape, np.dtype(dtype)), [])
        try:
            return free.pop()
        except IndexError:
            return np.zeros(shape, dtype)

    def give_back(self, table: Any) -> None:
        """Return an array that is all zeros again, for reuse by `zeroed`; a few of each shape and dtype are kept."""
        free = self.tables.setdefault((table.shape, table.dtype), [])
        if len(free) < 2 * self.threads and len(self.tables) < 9:
            free.append(table)

    def map(self, function: Callable[..., T], pieces: Iterable[tuple[Any, ...]]) -> list[T]:
        """function(*piece) of every piece, in order; few are submitted at once, however many there are."""
        waiting: deque[Future[T]] = deque()
        results = []
        for piece in pieces:
            if len(waiting) > 2 * self.threads:
                results.append(waiting.popleft().result())
            waiting.append(self.executor.submit(function, *piece))
        return results + [future.result() for future in waiting]

    def stream(self, tasks: Callable[[], Iterator[Callable[[], T]]]) -> Iterator[T]:
        """The results of tasks in order, while later tasks are generated and computed.

        `tasks` runs in a thread of its own and may use `map`; a queue bounds the number of finished results.
        """
        ready: queue.Queue[Future[T] | BaseException | None] = queue.Queue(2 * self.threads + 1)
        stop = threading.Event()

        def put(item: Future[T] | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def prepare() -> None:
            try:
                for task in tasks():
                    if not put(self.executor.submit(task)):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=prepare, name="merge-plan", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item.result()
        finally:
            stop.set()
            thread.join()
