"""One thread for work that would hold up the event loop: decoding vectors and encoding them for the workers.

It is one for all uploads together: several threads that run Python would take turns with the event loop, which would
then wait for each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_THREAD = ThreadPoolExecutor(1, thread_name_prefix="steer")


async def run(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function, which runs in the thread, after what was given to it before. Raises what it raises."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, function, *arguments)
