"""The merge methods applied to steering vectors: the direction of each layer is merged as a delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from merges import methods
from merges.engine.jobs import run
from merges.engine.pool import Pool
from merges.engine.readers import Array
from merges.engine.tensor_task import Input, TensorTask
from merges.recipes.parameters import resolve
from merges.recipes.recipe import Recipe
from merges.recipes.validation import require_valid
from vectors.errors import ArtifactError, UsageError
from vectors.events import OnEvent, counter, ignore
from vectors.registry.layers import spans
from vectors.steering import FIRST_ROW_HINT, SteeringVector
from vectors.storage.files import digest_bytes


def merge(recipe: Recipe, vectors: Sequence[SteeringVector], *, on_event: OnEvent = ignore) -> SteeringVector:
    """Merge steering vectors of one model, layer by layer: each layer's direction, [hidden] float32, is one delta.

    The inputs of `recipe` are `vectors`, in this order; gradients run over the layers that the vectors hold. Raises
    UsageError, ArtifactError with all problems.
    """
    require_valid(recipe)
    method = methods.find(recipe.method)
    problems = []
    if method.statistics or recipe.slices or recipe.tokenizer:
        problems.append(f"steering vectors can't be merged by {recipe.method} with statistics, slices or a tokenizer")
    if problems:
        raise UsageError(
            problems, "use a method such as linear, task_arithmetic, ties or slerp, without slices and tokenizer"
        )
    first = vectors[0]
    for part, vector in zip(recipe.parts, vectors, strict=True):
        if vector.hidden_size != first.hidden_size:
            problems.append(
                f"{part.model} has hidden size {vector.hidden_size}, {recipe.parts[0].model} has {first.hidden_size}"
            )
        elif vector.base.get("digest") != first.base.get("digest"):
            problems.append(f"{part.model} and {recipe.parts[0].model} were extracted from different models")
        if vector.rows != first.rows:
            problems.append(
                f"{part.model} and {recipe.parts[0].model} may count their layers differently: {FIRST_ROW_HINT}"
            )
        if set(vector.layers) != set(first.layers):
            problems.append(
                f"{part.model} has the layers {spans(vector.layers)}, {recipe.parts[0].model} has {spans(first.layers)}"
            )
    if problems:
        raise ArtifactError(
            problems, "merge vectors of one model with the same layers; `steer vectors convert --layers` selects layers"
        )
    digests = [vector.digest for vector in vectors]
    order = sorted(range(len(vectors)), key=lambda i: digests[i]) if method.symmetric else range(len(vectors))
    depth = max(len(first.layers) - 1, 1)
    layers: dict[int, torch.Tensor] = {}
    report = counter(on_event, "merging", "layers")
    with Pool(1) as pool:
        scope: list[TensorTask] = []
        jobs: list[TensorTask] = []
        shared: dict[str, Any] = {}
        for number, i in enumerate(first.layers):
            name, position = f"layer.{i}", number / depth
            each, plain = {}, {}
            for option in method.options:
                if option.each:
                    given = [
                        resolve(option.name, (recipe.parts[m].options, recipe.options), name, position) for m in order
                    ]
                    each[option.name] = np.array([option.default if v is None else v for v in given], float)
                else:
                    value = resolve(option.name, (recipe.options,), name, position)
                    plain[option.name] = option.default if value is None else value
            inputs = tuple(
                Input(
                    recipe.parts[m].model, Array(vectors[m].layers[i].numpy()), True,
                    int(digest_bytes(f"{recipe.seed} {digests[m]} {name}".encode())[7:23], 16),
                )
                for m in order
            )  # fmt: skip
            jobs.append(
                TensorTask(
                    name, (first.hidden_size,), "F32", inputs, None, method, pool, each, plain,
                    as_delta=True, scope=scope if recipe.scope == "global" else (), shared=shared,
                )
            )  # fmt: skip
        scope += jobs
        for job, piece in run(jobs, pool):
            layers[int(job.name.partition(".")[2])] = torch.from_numpy(piece.copy())
            report(len(layers), len(jobs))
    parents = [
        {"digest": digests[m], "strength": recipe.parts[m].options.get("weight", recipe.options.get("weight", 1.0))}
        for m in order
    ]
    metadata: dict[str, Any] = {
        "method": {
            "name": recipe.method,
            "parameters": dict(recipe.options),
            "scope": recipe.scope,
            "seed": recipe.seed,
            **({"rows": first.rows} if first.rows is not None else {}),
        },
        "parents": [
            parent if isinstance(parent["strength"], int | float) else {"digest": parent["digest"], "strength": 1.0}
            for parent in parents
        ],
        "apply": sorted({i for vector in vectors for i in vector.apply}),
    }
    for key in ("base", "licence"):
        if key in first.metadata:
            metadata[key] = first.metadata[key]
    return SteeringVector(layers, metadata)
