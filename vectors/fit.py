"""Whether a vector fits a model: the size of the residual stream, the layers, and the model it was made from."""

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

    `base` is the model's identity (`references.identity`), None where it is not known: then, or with `any_base`, or for
    a vector that does not say what it was made from, only the sizes are compared.
    """
    found = []
    if vector.hidden_size != hidden_size:
        found.append(f"the vector {name} has hidden size {vector.hidden_size}, the model {hidden_size}")
    beyond = [i for i in vector.layers if i >= layers]
    if beyond:
        found.append(f"the vector {name} has layer {spans(beyond)}; the model has layers 0 to {layers - 1}")
    digest = vector.base.get("digest")
    if digest and base is not None and not any_base and base["digest"] != digest:
        found.append(
            f"the vector {name} belongs to {vector.base.get('name', digest)}, not to {base.get('name', base['digest'])}"
        )
    return found


def require(vectors: Iterable[tuple[str, SteeringVector]], **model: Any) -> None:
    """Refuse vectors that can't steer a model: `problems` of each, by name. Raises ArtifactError with all of them."""
    found = [problem for name, vector in vectors for problem in problems(name, vector, **model)]
    if found:
        raise ArtifactError(
            list(dict.fromkeys(found)), "use vectors of this model, or allow others of the same size: --any-base"
        )
