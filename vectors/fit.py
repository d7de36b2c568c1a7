"""Whether a steering vector fits a model: its hidden size, its layers, and the model it was extracted from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vectors.errors import ArtifactError
from vectors.steering import SteeringVector, spans


def problems(
    name: str,
    vector: SteeringVector,
    *,
    hidden_size: int,
    layers: int,
    base: Mapping[str, Any] | None,
    any_base: bool = False,
) -> list[str]:
    """Every reason why the vector called `name` can't steer a model; empty when it can.

    `hidden_size` and `layers` (their number) are the model's, `base` is its identity (`references.identity`). Only the
    sizes are compared if `base` is None, if `any_base` is set, or if the vector records no base.
    """
    reasons = []
    if vector.hidden_size != hidden_size:
        reasons.append(f"the vector {name} has hidden size {vector.hidden_size}, the model {hidden_size}")
    beyond = [i for i in vector.layers if i >= layers]
    if beyond:
        reasons.append(f"the vector {name} has layer {spans(beyond)}; the model has layers 0 to {layers - 1}")
    digest = vector.base.get("digest")
    if digest and base is not None and not any_base and base["digest"] != digest:
        reasons.append(
            f"the vector {name} belongs to {vector.base.get('name', digest)}, not to {base.get('name', base['digest'])}"
        )
    return reasons


def require(vectors: Iterable[tuple[str, SteeringVector]], **model: Any) -> None:
    """Refuse vectors that can't steer a model; `model` are the keyword arguments of `problems`.

    Raises ArtifactError with the problems of all vectors.
    """
    reasons = [problem for name, vector in vectors for problem in problems(name, vector, **model)]
    if reasons:
        raise ArtifactError(
            list(dict.fromkeys(reasons)),
            "use vectors of this model, or allow others of the same size: --any-base",
        )
