"""A merged delta as a task vector, streamed into one file or several."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from merges.engine.jobs import run
from merges.engine.tensor_task import TensorTask
from merges.outputs import card
from merges.recipes.plan import Plan
from vectors import references
from vectors.events import OnEvent, counter, ignore
from vectors.task import TaskVector
from vectors.taskwriter import Writer, check_vector_path, paths, room, shards, write_index
from vectors.weights import file_digest


def write_vector(made: Plan, path: Path, largest: int, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Write the merged delta as an artifact of float32 values, in files of at most `largest` bytes.

    Returns the record, with the digest of each file. Raises OutputError, and ArtifactError for values that can't be
    merged.
    """
    jobs = {job.name: job for job in made.jobs if isinstance(job, TensorTask)}
    groups = shards({name: 4 * job.count for name, job in jobs.items()}, largest)
    check_vector_path(path, len(groups))
    inputs = card.inputs(made)
    if made.base is not None and made.base.model is not None:
        identity: Any = references.identity(made.base.model)
    else:
        identity = next(s.vector.base for s in made.sources if s.vector is not None)
    recipe = made.recipe.value()
    recipe["models"] = [{k: v for k, v in entry.items() if k != "model"} for entry in recipe["models"]]
    recipe.pop("base", None)
    common: dict[str, Any] = {
        "base": identity,
        "method": {"name": made.recipe.method, "recipe": recipe},
        "parents": [entry for entry in inputs if entry["name"] != "base"],
        "storage": {"kind": "float32"},
    }
    dtypes = {name: made.base.entries[name].dtype if made.base else _dtype(job, made) for name, job in jobs.items()}
    report, done, total = counter(on_event, "merging", "bytes"), 0, sum(4 * job.count for job in jobs.values())
    with contextlib.ExitStack() as stack:
        writers, later = [], []
        for number, (file, group) in enumerate(zip(paths(path, len(groups)), groups, strict=True), 1):
            writer = stack.enter_context(Writer(file, room({n: jobs[n].shape for n in group}, common)))
            parameters, unchanged = {}, []
            for name in group:
                job, changed = jobs[name], False
                writer.begin()
                for _, piece in run([job], made.pool):
                    changed |= bool(piece.any())
                    writer.write(memoryview(np.ascontiguousarray(piece).data).cast("B"))
                if changed:
                    writer.end(name, "F32", job.shape)
                    parameters[name] = [list(job.shape), dtypes[name]]
                else:
                    writer.drop()
                    unchanged.append(name)
                done += 4 * job.count
                report(done, total)
            writers.append(writer)
            later.append({"parameters": parameters, "unchanged": unchanged, "shard": [number, len(groups)]})
        for writer, own in zip(writers, later, strict=True):
            writer.finish(common | own)
        write_index(path, writers)
    vector = TaskVector.open(path)
    files = {file.name: file_digest(file) for file in vector.files}
    return {"recipe": made.recipe.value(), "plan": made.digest, "inputs": inputs, "outputs": files}


def _dtype(job: TensorTask, made: Plan) -> str:
    return next((s.vector.dtype(job.name) for s in made.sources if s.vector and job.name in s.vector.parameters), "F32")
