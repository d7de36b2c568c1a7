"""One thread for work that would hold up the event loop: decoding vectors and encoding them for the workers.

It is one for all uploads together: several threads that run Python would take turns with the event loop, which would
then wait for each of them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Seconds after which the thread lets the event loop run, which waits for the interpreter several times in each request.
# Python's default is ten times as long.
SWITCH = 0.0005

_THREAD = ThreadPoolExecutor(1, thread_name_prefix="steer")


async def run(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function, which runs in the thread, after what was given to it before. Raises what it raises."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, _yielding, function, *arguments)


def _yielding(function: Callable[..., T], *arguments: object) -> T:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        return function(*arguments)
    finally:
        sys.setswitchinterval(before)
