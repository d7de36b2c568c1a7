"""The weight files (shards) of a model folder: written piece by piece, each of them complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from merges.engine.jobs import Job, run
from merges.engine.pool import Pool
from merges.recipes.layout import size
from vectors.storage.files import new_file
from vectors.weights import header_bytes

FLUSH = 64 << 20  # bytes between two flushes


def names(count: int) -> list[str]:
    """The shards' file names, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def header(jobs: Sequence[Job]) -> bytes:
    """The safetensors header of one shard."""
    return header_bytes({job.name: (job.dtype, tuple(job.shape), size(job)) for job in jobs}, {"format": "pt"})


def file_size(jobs: Sequence[Job]) -> int:
    """The bytes of one shard with its header."""
    return len(header(jobs)) + sum(map(size, jobs))


def pieces(shard: Sequence[Job], pool: Pool) -> Iterator[memoryview]:
    """The bytes of one shard, from its header on."""
    yield memoryview(header(shard))
    for _, piece in run(shard, pool):
        yield memoryview(np.ascontiguousarray(piece).data).cast("B") if piece.size else memoryview(b"")


def write(path: Path, content: Iterator[memoryview], show: Callable[[int], None] = lambda written: None) -> str:
    """Write a file that appears complete or not at all; returns its digest. `show` receives the bytes written so far.

    Hashing and flushing to disk run in threads of their own, because all three in sequence took longer than merging.
    """
    state, written, flushed = hashlib.sha256(), 0, 0
    hashed: Future[None] | None = None
    flushing: Future[None] | None = None
    with (
        new_file(path, buffering=0) as file,
        ThreadPoolExecutor(2, thread_name_prefix="merge-write") as beside,
    ):
        for piece in content:
            if hashed is not None:
                hashed.result()  # pieces are hashed in order, at most one behind
            hashed = beside.submit(state.update, piece)
            view = piece
            while view:
                view = view[file.write(view) :]
            written += len(piece)
            if written - flushed > FLUSH and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()  # a write error is reported by one flush only, not again by the last one
                flushing, flushed = beside.submit(os.fdatasync, file.fileno()), written
            show(written)
        for last in (hashed, flushing):
            if last is not None:
                last.result()
    return "sha256:" + state.hexdigest()


def index(shards: Sequence[Sequence[Job]]) -> bytes:
    """model.safetensors.index.json, as transformers writes it."""
    files = names(len(shards))
    weight_map = {job.name: file for file, shard in zip(files, shards, strict=True) for job in shard}
    value = {"metadata": {"total_size": sum(size(job) for shard in shards for job in shard)}, "weight_map": weight_map}
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
