"""The distribution of the result's tensors over files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merges.engine.jobs import Job
from vectors.weights import SIZES

LARGEST = 5_000_000_000  # the largest size of a file, in bytes


def size(job: Job) -> int:
    """The size in bytes of a tensor of the result."""
    return int(np.prod(job.shape, dtype=np.int64)) * SIZES[job.dtype]


def cut(jobs: Sequence[Job], largest: int = LARGEST) -> list[list[Job]]:
    """The jobs divided, in order, into files of at most `largest` bytes each."""
    shards: list[list[Job]] = [[]]
    room = largest
    for job in jobs:
        if size(job) > room and shards[-1]:
            shards.append([])
            room = largest
        shards[-1].append(job)
        room -= size(job)
    return shards
