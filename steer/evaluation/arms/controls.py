"""The controls of an arm that steers by vectors: the same expression, with every vector replaced.

A control vector has the length of the one that it replaces, layer by layer, so that what is compared is the direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from probes.controls import covariance_direction, without
from probes.seeds import child_seed
from steer.evaluation.arms.arm import Arm
from vectors.errors import ArtifactError, ExpressionError
from vectors.registry.layers import spans
from vectors.steering import SteeringVector

# The controls by name, in the order of reports, and what each is.
CONTROLS = {
    "base": "the unsteered model",
    "negation": "the subject with the opposite sign",
    "shuffled": "vectors re-extracted from shuffled labels, at the subject's norm",
    "random": "random directions with the covariance of the layer's activations, at the subject's norm",
    "random-kl": "the same random directions, scaled to the subject's 95th percentile of the KL",
    "orthogonal": "such random directions without their part along the subject, at its norm",
    "donor": "the vector of another behaviour, at the subject's norm",
}

# From the name of a vector, a layer and its direction [hidden] to the direction that replaces it.
Replacement = Callable[[str, int, Tensor], Tensor]


def acting_layers(arm: Arm) -> list[int]:
    """The layers at which any term of the arm acts, ascending."""
    if arm.composition is None:
        return []
    return sorted({layer for term in arm.composition.terms for layer in arm.vectors[term.name].acting(term.layers)})


def replaced(arm: Arm, name: str, direction: Replacement, states: Mapping[int, Tensor] | None = None) -> Arm:
    """The arm with each of its vectors replaced, at the layers where it acts; a zero vector stays zero.

    For an ablation to the mean, the mean is that of `states` [tokens, hidden] by layer.
    """
    assert arm.composition is not None
    layers: dict[str, set[int]] = {}
    for term in arm.composition.terms:
        layers.setdefault(term.name, set()).update(arm.vectors[term.name].acting(term.layers))
    operations = {term.operation for term in arm.composition.terms}
    vectors = {}
    for vector_name, wanted in layers.items():
        vector = arm.vectors[vector_name]
        directions = {layer: direction(vector_name, layer, vector.layers[layer]) for layer in sorted(wanted)}
        apply = [layer for layer in vector.apply if layer in directions] or list(directions)
        base = {"base": dict(vector.base)} if vector.base else {}
        measured = {
            str(layer): {"projection": float(states[layer].mean(0) @ each / (each @ each).clamp(min=1e-30))}
            for layer, each in directions.items()
            if states is not None and layer in states and "mean_ablate" in operations
        }
        metadata = {**base, "apply": apply, **({"measured": measured} if measured else {})}
        vectors[vector_name] = SteeringVector(directions, metadata)
    return replace(arm, name=name, vectors=vectors)


def negation(arm: Arm) -> Arm | None:
    """The arm with the opposite sign; None for one that can't be scaled."""
    try:
        return arm.scaled(-1.0, f"{arm.name}: negation")
    except ExpressionError:
        return None


def random_arms(arm: Arm, states: Mapping[int, Tensor], count: int, seed: int) -> list[Arm]:
    """Arms with random directions of the covariance of states [tokens, hidden] by layer."""

    def draw(index: int) -> Replacement:
        return lambda name, layer, direction: covariance_direction(
            states[layer], float(direction.norm()), child_seed(seed, "random", index, name, layer)
        )

    return [replaced(arm, f"{arm.name}: random {index + 1}", draw(index), states) for index in range(count)]


def orthogonal_arms(arm: Arm, states: Mapping[int, Tensor], count: int, seed: int) -> list[Arm]:
    """Random directions without their part along the subject's: a perturbation of the same length and no more."""

    def draw(index: int) -> Replacement:
        def direction(name: str, layer: int, original: Tensor) -> Tensor:
            length = float(original.norm())
            drawn = covariance_direction(states[layer], length, child_seed(seed, "orthogonal", index, name, layer))
            return without(drawn, original, length)

        return direction

    return [replaced(arm, f"{arm.name}: orthogonal {index + 1}", draw(index), states) for index in range(count)]


def shuffled_arms(
    arm: Arm, directions: Sequence[Mapping[int, Tensor]], states: Mapping[int, Tensor] | None = None
) -> list[Arm]:
    """Arms with re-extracted directions [hidden] by layer, each at the length of the one that it replaces."""

    def draw(extracted: Mapping[int, Tensor]) -> Replacement:
        return lambda _name, layer, direction: _at_length(extracted[layer], float(direction.norm()))

    return [replaced(arm, f"{arm.name}: shuffled {n}", draw(each), states) for n, each in enumerate(directions, 1)]


def donor_arm(arm: Arm, donor: SteeringVector, name: str, states: Mapping[int, Tensor] | None = None) -> Arm:
    """The arm with a donor's directions. Raises ArtifactError where the donor lacks a layer."""
    missing = [layer for layer in acting_layers(arm) if layer not in donor.layers]
    if missing:
        raise ArtifactError(
            f"the donor {name} holds no layer {spans(missing)}, at which {arm.name} acts",
            f"it holds {spans(donor.layers)}; extract it at all layers",
        )
    return replaced(
        arm,
        f"{arm.name}: donor {name}",
        lambda _name, layer, direction: _at_length(donor.layers[layer], float(direction.norm())),
        states,
    )


def _at_length(direction: Tensor, length: float) -> Tensor:
    norm = float(direction.norm())
    return direction * (length / norm) if norm > 0 else direction
