"""Write a merged delta as a task vector, streamed into one file or several."""

from __future__ import annotations

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
from vectors.taskwriter import Writer, require_vector_path, shards, write_files
from vectors.weights import file_digest


def write_vector(planned: Plan, path: Path, largest: int, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Write the merged delta as a task vector of float32 values, in files of at most `largest` bytes.

    Returns the record, with the digest of each file. Raises OutputError, and ArtifactError for values that are not
    finite.
    """
    jobs = {job.name: job for job in planned.jobs if isinstance(job, TensorTask)}
    groups = shards({name: 4 * job.count for name, job in jobs.items()}, largest)
    require_vector_path(path, len(groups))
    inputs = card.inputs(planned)
    if planned.base is not None and planned.base.model is not None:
        base: Any = references.identity(planned.base.model)
    else:
        base = next(source.vector.base for source in planned.sources if source.vector is not None)
    recipe = planned.recipe.value()
    recipe["models"] = [{key: value for key, value in entry.items() if key != "model"} for entry in recipe["models"]]
    recipe.pop("base", None)
    common: dict[str, Any] = {
        "base": base,
        "method": {"name": planned.recipe.method, "recipe": recipe},
        "parents": [entry for entry in inputs if entry["name"] != "base"],
        "storage": {"kind": "float32"},
    }
    report, done, total = counter(on_event, "merging", "bytes"), 0, sum(4 * job.count for job in jobs.values())

    def write_parameter(writer: Writer, name: str) -> str | None:
        nonlocal done
        job, changed = jobs[name], False
        writer.begin()
        for _, piece in run([job], planned.pool):
            changed |= bool(piece.any())
            writer.write(memoryview(np.ascontiguousarray(piece).data).cast("B"))
        if changed:
            writer.end(name, "F32", job.shape)
        else:
            writer.drop()
        done += 4 * job.count
        report(done, total)
        return _dtype(job, planned) if changed else None

    write_files(path, groups, {name: job.shape for name, job in jobs.items()}, common, write_parameter)
    vector = TaskVector.open(path)
    files = {file.name: file_digest(file) for file in vector.files}
    return {"recipe": planned.recipe.value(), "plan": planned.digest, "inputs": inputs, "outputs": files}


def _dtype(job: TensorTask, planned: Plan) -> str:
    """The dtype of a parameter in the model: that of the base, or without a base the one that the vectors record."""
    if planned.base is not None:
        return planned.base.entries[job.name].dtype
    vectors = [source.vector for source in planned.sources if source.vector is not None]
    return next((vector.dtype(job.name) for vector in vectors if job.name in vector.parameters), "F32")
