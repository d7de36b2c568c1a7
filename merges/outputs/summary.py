"""Each input's part in the result of a merge, estimated from a sample that is too small to slow the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from merges.engine.floats import to_float32
from merges.engine.tensor_task import TensorTask
from merges.recipes.plan import Plan
from vectors.weights import entries_of, mapped

PIECES, PIECE = 256, 4096  # the pieces of a sample, spread evenly over all elements, and the elements of each


def summarize(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """Of each input, against the base: the norm of its delta (estimated from the sample), the share of its elements
    that the density keeps (all without one), the share of the sample where its sign is not the result's, and the
    cosine of its delta to the result's.

    `sampled` is the share of all elements that was read. None where the result has no base to compare with.
    """
    tasks = [job for job in plan.jobs if isinstance(job, TensorTask) and job.count and job.base is not None]
    if not tasks:
        return None
    total = sum(job.count for job in tasks)
    written = entries_of(sorted(folder.glob("*.safetensors")))
    count = len(plan.recipe.parts)
    squares, products, conflicts, compared, kept = (np.zeros(count) for _ in range(5))
    result_squares, sampled = 0.0, 0
    step = max(total // PIECES, 1)
    at, start_of = 0, 0
    for job in tasks:
        names = [source.name for source in job.inputs]
        rows = [[part.name for part in plan.recipe.parts].index(name) for name in names]
        kept[rows] += job.count * np.asarray(job.each.get("density", np.ones(len(rows))))
        while at < start_of + job.count:
            start = at - start_of
            stop = min(start + PIECE, job.count)
            block = job.block(start, stop)
            entry = written[job.name]
            base = block.base
            assert base is not None
            result = to_float32(mapped(entry)[start:stop], entry.dtype) - base
            deltas = block.values if job.in_deltas else block.values - base
            weights = np.sign(np.asarray(job.each.get("weight", np.ones(len(rows)))))[:, None]
            signs, input_signs = np.sign(result), np.sign(deltas) * weights
            squares[rows] += np.square(deltas, dtype=np.float64).sum(1)
            products[rows] += (deltas * result).sum(1, dtype=np.float64)
            conflicts[rows] += (input_signs * signs < 0).sum(1)
            compared[rows] += (input_signs * signs != 0).sum(1)
            result_squares += float(np.square(result, dtype=np.float64).sum())
            sampled += stop - start
            at += max(step, stop - start)
        start_of += job.count
    scale = total / max(sampled, 1)
    norms = np.sqrt(squares * scale)
    lengths = np.sqrt(squares * result_squares)
    return {
        "sampled": sampled / total,
        "inputs": [
            {
                "name": part.name,
                "norm": float(norms[row]),
                "kept": float(kept[row] / total),
                "sign_conflicts": float(conflicts[row] / compared[row]) if compared[row] else 0.0,
                "cosine": float(products[row] / lengths[row]) if lengths[row] else 0.0,
            }
            for row, part in enumerate(plan.recipe.parts)
        ],
    }
