"""Independent passes of one model on a processor, several at a time, each on its share of the cores.

One pass on all cores waits for the slowest core after every operation, and for Python between operations. Two passes
with a core each do not: they take a model of smollm2's size 10 to 20 % less time, and give the same bits.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST = 8  # threads: the memory of a pass is needed for each

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_threads(function: Callable[[Task], Result], tasks: Sequence[Task], device: torch.device) -> list[Result]:
    """The results of `function` in inference mode, in the order of `tasks`, each with a copy of the context variables.

    On another device than a processor, and where torch has one thread, tasks run one after another. Raises what a task
    raises, the first of them in order; those that have not begun are left out.
    """
    total = torch.get_num_threads()
    workers = min(total, len(tasks), MOST)

    def call(context: contextvars.Context, task: Task) -> Result:
        with torch.inference_mode():  # a setting of each thread
            return context.run(function, task)

    contexts = [contextvars.copy_context() for _ in tasks]
    if workers < 2 or device.type != "cpu":
        return list(map(call, contexts, tasks))
    try:
        # The number of threads of an operation is a setting of the thread that calls it, and the default of new ones.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(total // workers,)) as pool:
            return list(pool.map(call, contexts, tasks))
    finally:
        torch.set_num_threads(total)
