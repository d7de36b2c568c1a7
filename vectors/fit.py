"""Whether a steering vector fits a model (its hidden size, layers and base), and a composition its recommendations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vectors.documents.artifacts import RESIDUAL
from vectors.errors import ArtifactError
from vectors.expression import Composition
from vectors.probe import Probe, reading_of
from vectors.registry.layers import spans
from vectors.steering import FIRST_ROW_HINT, SteeringVector

BEYOND = 20  # times the recommended strength that a composition may have without --allow-strength


def problems_of(
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
    if vector.rows is not None and vector.rows != layers + 1:
        reasons.append(
            f"the vector {name} is a stack of {vector.rows} rows, the model has {layers} layers: "
            + (
                "the first row seems to be block 0, not the embeddings; " + FIRST_ROW_HINT
                if vector.rows == layers
                else f"{layers + 1} rows would begin with the embeddings, {layers} with block 0; " + FIRST_ROW_HINT
            )
        )
        return reasons
    beyond = [i for i in vector.layers if i >= layers]
    if beyond:
        reasons.append(f"the vector {name} has layer {spans(beyond)}; the model has layers 0 to {layers - 1}")
        if beyond == [layers] and vector.metadata.get("method", {}).get("name") == "imported":
            reasons[-1] += ", counted from 0 without the embeddings, which are the first of transformers' hidden_states"
    digest = vector.base.get("digest")
    if digest and base is not None and not any_base and base["digest"] != digest:
        reasons.append(
            f"the vector {name} belongs to {vector.base.get('name', digest)}, not to {base.get('name', base['digest'])}"
        )
    return reasons


def problems_of_probe(
    name: str,
    probe: Probe,
    *,
    hidden_size: int,
    layers: int,
    base: Mapping[str, Any] | None,
    any_base: bool = False,
) -> list[str]:
    """Every reason why the probe called `name` can't read a model; empty when it can. Arguments as of `problems_of`.

    The hidden size is compared only where the probe reads the residual stream: other sites have other sizes.
    """
    reasons = []
    if probe.site == RESIDUAL and probe.hidden_size != hidden_size:
        reasons.append(f"the probe {name} has hidden size {probe.hidden_size}, the model {hidden_size}")
    beyond = [i for i in probe.layers if i >= layers]
    if beyond:
        reasons.append(f"the probe {name} has layer {spans(beyond)}; the model has layers 0 to {layers - 1}")
    digest = probe.base.get("digest")
    if digest and base is not None and not any_base and base["digest"] != digest:
        reasons.append(
            f"the probe {name} was trained on {probe.base.get('name', digest)}, "
            f"not on {base.get('name', base['digest'])}"
        )
    return reasons


def problems_of_means(composition: Composition, vectors: Mapping[str, SteeringVector]) -> list[str]:
    """Every ablation to the mean of a vector that does not record its mean where the term acts."""
    reasons = []
    for term in composition.terms:
        vector = vectors.get(term.name)
        if term.operation != "mean_ablate" or vector is None:
            continue
        layers = [i for i in vector.acting(term.layers) if i in vector.layers and vector.mean_at(i) is None]
        if layers:
            reasons.append(
                f"the vector {term.name} records no mean projection at layer {spans(layers)}, which {term} needs; "
                "extract it again (files from before have none, nor have sums of vectors)"
            )
    return list(dict.fromkeys(reasons))


def problems_of_conditions(
    composition: Composition,
    vectors: Mapping[str, SteeringVector],
    probes: Mapping[str, Probe | SteeringVector],
) -> list[str]:
    """Every condition that can't be read before its term acts; names that the mappings lack are left out.

    A condition reads the residual stream at a layer (`probe.reading_of`) below every layer that its term steers. One
    that no score fulfils is only read, at any layer.
    """
    reasons = []
    for term in composition.terms:
        for condition in term.conditions:
            source = probes.get(condition.name)
            if source is None:
                continue
            if isinstance(source, Probe) and source.site != RESIDUAL:
                reasons.append(f"the probe {condition.name} reads {source.site}; a condition reads {RESIDUAL}")
                continue
            if condition.layer is not None and condition.layer not in source.layers:
                reasons.append(f"{condition.name} holds no layer {condition.layer}; it holds {spans(source.layers)}")
                continue
            layer, readout = reading_of(source, condition.layer)
            vector = vectors.get(term.name)
            if vector is not None and vector.hidden_size != source.hidden_size:
                reasons.append(
                    f"{condition.name} has hidden size {source.hidden_size}, the vector {term.name} "
                    f"{vector.hidden_size}"
                )
            if isinstance(source, SteeringVector) and not bool(readout.weight.any()):
                reasons.append(f"the vector {condition.name} is zero at layer {layer}, so there is nothing to read")
            lowest = min(vector.acting(term.layers)) if vector is not None else None
            if lowest is not None and layer >= lowest and not condition.never:
                reasons.append(
                    f"{condition} reads layer {layer}, and {term} steers from layer {lowest}: "
                    "what is read must lie below"
                )
    return list(dict.fromkeys(reasons))


def require_fit(vectors: Iterable[tuple[str, SteeringVector | Probe]], **model: Any) -> None:
    """Refuse vectors that can't steer a model, and probes that can't read it; `model` are the keyword arguments of
    `problems_of`.

    Raises ArtifactError with the problems of all of them.
    """
    reasons = [
        problem
        for name, source in vectors
        for problem in (
            problems_of_probe(name, source, **model)
            if isinstance(source, Probe)
            else problems_of(name, source, **model)
        )
    ]
    if reasons:
        raise ArtifactError(
            list(dict.fromkeys(reasons)),
            "use vectors of this model, or allow others of the same size: --any-base",
        )


def problems_of_strength(composition: Composition, vectors: Mapping[str, SteeringVector]) -> list[str]:
    """Every vector that a composition uses more than `BEYOND` times as strongly as the vector's file recommends.

    The strengths of terms of one vector are added by magnitude, also where their scopes differ; a `clamp` counts with
    its level, an `ablate` against strength 1, which removes all; shares and rotations are no strengths. A vector
    without a recommendation has no limit.
    """
    reasons = []
    for name in composition.names:
        recommended = recommended_strength(vectors[name]) if name in vectors else None
        if recommended is None:
            continue
        terms = [term for term in composition.terms if term.name == name]
        strength = sum(abs(term.value) for term in terms if term.operation in ("add", "clamp"))
        ablated = sum(abs(term.value) for term in terms if term.operation in ("ablate", "mean_ablate"))
        if strength > BEYOND * recommended:
            reasons.append(
                f"{name} has strength {strength:g}, {strength / recommended:.3g} times the {recommended:g} recommended"
            )
        if ablated > BEYOND:
            reasons.append(f"ablate({name}) has strength {ablated:g}; 1 removes the direction")
    return reasons


def recommended_strength(vector: SteeringVector) -> float | None:
    """The magnitude of the strength that a vector's file recommends; None where it recommends none."""
    recommended = vector.metadata.get("recommended")
    strength = recommended.get("strength") if isinstance(recommended, Mapping) else None
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        return None
    return abs(strength) if math.isfinite(strength) and strength else None
