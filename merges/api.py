"""What the commands do, as functions: merge, merge into a vector, apply, verify."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merges.engine.jobs import run
from merges.engine.tensor_task import TensorTask
from merges.inputs import bases
from merges.outputs import card, model_folder
from merges.recipes.document import parse
from merges.recipes.plan import MEMORY, SHARD, Plan, plan
from merges.recipes.recipe import Part, Recipe
from vectors import references
from vectors.errors import ArtifactError, ExpressionError, SteerError, UsageError, guess
from vectors.task import TaskVector
from vectors.taskwriter import Writer, check_vector_path, paths, room, shards, write_index
from vectors.weights import file_digest

if TYPE_CHECKING:
    from vectors.expression import Composition

Progress = Callable[[int, int], None]


def merge(
    recipe: Recipe, out: str | Path, *, memory: int = MEMORY, threads: int | None = None, shard: int = SHARD,
    device: str = "cpu", progress: Progress | None = None, planned: Callable[[Plan], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Do what a recipe says: a model folder at `out`, or a task vector where the recipe says `as: vector`.

    Returns the record with all digests. `planned` is called with the plan before a weight is read. Raises UsageError,
    ModelError and OutputError before any work; ArtifactError for values that can't be merged.
    """
    target = Path(out)
    made = plan(recipe, memory=memory, threads=threads, shard=shard, device=device)
    with made.pool:
        if planned:
            planned(made)
        if recipe.as_ == "vector":
            return _write_vector(made, target, shard, progress)
        record = model_folder.write_model(made, target, progress)
        if made.base is not None:
            bases.remember(made.base.identity, made.base.path)
        return record


def from_expression(composition: Composition, files: dict[str, str], base: str | None) -> Recipe:
    """`v1 + 0.6*v2 - 0.5*toxic` as task arithmetic. Raises ExpressionError for what only steering vectors can do."""
    problems = [
        f"{term} is not an addition; task vectors are added, negated and scaled"
        for term in composition.terms
        if term.operation != "add"
    ]
    problems += [
        f"{term} names layers or tokens; a task vector has none"
        for term in composition.terms
        if term.layers or term.scope
    ]
    if problems:
        raise ExpressionError(problems, "write such as: v1 + 0.6*v2 - 0.5*toxic")
    weights: dict[str, float] = {}
    for term in composition.terms:
        weights[term.name] = weights.get(term.name, 0.0) + term.value
    parts = tuple(Part(files[name], name, {"weight": value}) for name, value in weights.items())
    return Recipe("task_arithmetic", parts, base)


def _write_vector(made: Plan, path: Path, largest: int, progress: Progress | None) -> dict[str, Any]:
    """The merged delta as an artifact of float32 values."""
    import contextlib

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
    done, total = 0, sum(job.count for job in jobs.values())
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
                done += job.count
                if progress:
                    progress(done, total)
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


def read_record(out: Path) -> dict[str, Any]:
    """The record of a finished merge. Raises ArtifactError."""
    path = out / card.RECORD
    if out.is_file():
        raise ArtifactError(
            f"{out} is a file, and has no record to be verified by", "name a model folder that `steer merge` wrote"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key in ("recipe", "plan"):
            record[key]
        for entry in record["inputs"]:
            _ = entry["name"], entry["identity"], entry["files"].keys()
        texts = [*record["outputs"].values(), *(name for shard in record["shards"] for name in shard)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its digests or shards are no texts")
    except OSError as error:
        raise ArtifactError(
            f"{path} can't be read: {error.strerror}", "name a folder that `steer merge` wrote"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}", "its weights may be good, but nothing says what they are"
        ) from error
    return record


def verify(
    out: str | Path, *, places: Mapping[str, str | Path] | None = None, memory: int = MEMORY,
    threads: int | None = None, device: str = "cpu", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compute a finished merge again from its recipe and compare every byte. Raises ArtifactError with what differs.

    `places` says where inputs lie that have moved since, by their names in the recipe; `base` is the base's.
    """
    folder = Path(out)
    record = read_record(folder)
    recipe = parse(record["recipe"], str(folder / card.RECORD))
    known = {part.name: part.model for part in recipe.parts} | ({"base": recipe.base} if recipe.base else {})
    moved = {name: str(place) for name, place in (places or {}).items()}
    if not recipe.base and "base" in moved:
        recipe, known = replace(recipe, base=moved["base"]), known | {"base": moved["base"]}
    unknown = [f"the recipe has no input {name!r}{guess(name, known)}" for name in moved if name not in known]
    if unknown:
        raise UsageError(unknown, f"it has {', '.join(known)}")
    recipe = recipe.renamed({known[name]: place for name, place in moved.items()})
    try:
        made = plan(recipe, memory=memory, threads=threads, device=device)
    except SteerError as error:
        hint = "verify from the folder in which the merge was made, or say where its inputs are: --vector NAME=PATH"
        raise ArtifactError(error.problems, hint) from error
    with made.pool:
        _same_shards(made, record["shards"])
        if made.digest != record["plan"]:
            changed = [
                f"the input {before['name']} is another one now: {after['identity']}, not {before['identity']}"
                for before, after in zip(record["inputs"], card.inputs(made), strict=False)
                if before["identity"] != after["identity"]
            ]
            raise ArtifactError(
                changed or [f"the plan of {folder} can't be made again: the recipe or the arithmetic has changed"],
                "verify with the inputs it was made from",
            )
        problems = model_folder.verify(made, folder, record, progress)
    if problems:
        raise ArtifactError([f"{folder}: {problem}" for problem in problems], "make the merge again")
    return record


def _same_shards(made: Plan, shards_: list[list[str]]) -> None:
    """Lay the plan out as the record says, whatever the size of a shard was then."""
    by_name = {job.name: job for job in made.jobs}
    if sorted(by_name) == sorted(name for shard in shards_ for name in shard):
        made.shards = [[by_name[name] for name in shard] for shard in shards_]
