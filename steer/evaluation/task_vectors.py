"""Norms and cosines of task vectors, computed one parameter at a time: a vector may be larger than the memory."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from vectors.errors import ArtifactError
from vectors.task import TaskVector

_LAYER = re.compile(r"\.(\d+)\.")


def norms(vector: TaskVector) -> dict[str, float]:
    """The Frobenius norm of each parameter's delta, by name."""
    import numpy as np

    return {name: float(np.sqrt(np.square(vector.delta(name), dtype=np.float64).sum())) for name in vector.parameters}


def by_layer(parameters: dict[str, float]) -> dict[str, float]:
    """The norm over the parameters of each layer, by the first number in their names; `other` are those without."""
    squares: dict[str, float] = {}
    for name, norm in parameters.items():
        match = _LAYER.search(name)
        key = match[1] if match else "other"
        squares[key] = squares.get(key, 0.0) + norm**2
    ordered = sorted(squares, key=lambda key: (key == "other", int(key) if key != "other" else 0))
    return {key: math.sqrt(squares[key]) for key in ordered}


def cosines(vectors: Sequence[TaskVector]) -> list[list[float]]:
    """The cosine of each two vectors over all parameters; a parameter that one lacks counts as unchanged there.

    NaN where one changes nothing. Raises ArtifactError for parameters of different shapes.
    """
    import numpy as np

    count = len(vectors)
    products = [[0.0] * count for _ in range(count)]
    for name in sorted({name for vector in vectors for name in vector.parameters}):
        shapes = {vector.parameters[name] for vector in vectors if name in vector.parameters}
        if len(shapes) > 1:
            raise ArtifactError(
                f"{name} has different shapes: {' and '.join(str(list(shape)) for shape in sorted(shapes))}",
                "compare vectors of one architecture",
            )
        deltas = [
            vector.delta(name).reshape(-1).astype(np.float64) if name in vector.parameters else None
            for vector in vectors
        ]
        for i, a in enumerate(deltas):
            for j, b in enumerate(deltas[: i + 1]):
                if a is not None and b is not None:
                    products[i][j] += float(a @ b)
    lengths = [math.sqrt(products[i][i]) for i in range(count)]
    return [
        [_ratio(products[max(i, j)][min(i, j)], lengths[i] * lengths[j]) for j in range(count)] for i in range(count)
    ]


def _ratio(product: float, length: float) -> float:
    return product / length if length else math.nan
