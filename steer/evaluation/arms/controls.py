"""The controls of an arm that steers by vectors: the same expression, with every vector replaced.

Control vectors have the lengths of those that they replace, layer by layer, and are as alike, so that what is compared
is the direction: a sum of vectors, over terms or over layers, is not shorter because its parts were drawn apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probes.controls import as_alike, covariance_direction
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

# From a layer and its directions [vectors, hidden], in the order of their names, to those that replace them.
Replacement = Callable[[int, Mapping[str, Tensor]], Tensor]


def acting_layers(arm: Arm) -> list[int]:
    """The layers at which any term of the arm acts, ascending."""
    if arm.composition is None:
        return []
    return sorted({layer for term in arm.composition.terms for layer in arm.vectors[term.name].acting(term.layers)})


def replaced(arm: Arm, name: str, replacement: Replacement, states: Mapping[int, Tensor] | None = None) -> Arm:
    """The arm with each of its vectors replaced, at the layers where it acts; a zero vector stays zero.

    For an ablation to the mean, the mean is that of `states` [tokens, hidden] by layer.
    """
    assert arm.composition is not None
    by_layer: dict[int, dict[str, Tensor]] = {}
    for term in sorted(arm.composition.terms, key=lambda term: term.name):
        vector = arm.vectors[term.name]
        for layer in vector.acting(term.layers):
            by_layer.setdefault(layer, {})[term.name] = vector.layers[layer]
    drawn: dict[str, dict[int, Tensor]] = {term.name: {} for term in arm.composition.terms}
    for layer in sorted(by_layer):
        for vector_name, direction in zip(by_layer[layer], replacement(layer, by_layer[layer]), strict=True):
            drawn[vector_name][layer] = direction
    operations = {term.operation for term in arm.composition.terms}
    vectors = {}
    for vector_name, directions in drawn.items():
        vector = arm.vectors[vector_name]
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
    """The arm of a composition, an adapter or a task vector with the opposite sign; None where it can't be scaled."""
    if arm.composition is None:
        return replace(arm, name=f"{arm.name}: negation", weight=-arm.weight)
    try:
        return arm.scaled(-1.0, f"{arm.name}: negation")
    except ExpressionError:
        return None


def random_arms(arm: Arm, states: Mapping[int, Tensor], count: int, seed: int) -> list[Arm]:
    """Arms with random directions of the covariance of states [tokens, hidden] by layer, of the same tokens at each."""
    return _drawn(arm, "random", states, count, seed)


def orthogonal_arms(arm: Arm, states: Mapping[int, Tensor], count: int, seed: int) -> list[Arm]:
    """Random directions without their part along the subject's: a perturbation of the same length and no more."""
    return _drawn(arm, "orthogonal", states, count, seed)


def _drawn(arm: Arm, kind: str, states: Mapping[int, Tensor], count: int, seed: int) -> list[Arm]:
    def draw(index: int) -> Replacement:
        def directions(layer: int, originals: Mapping[str, Tensor]) -> Tensor:
            # One seed for all layers, so that what is drawn at one adds to what is drawn at the next.
            seeds = [child_seed(seed, kind, index, name) for name in originals]
            drawn = torch.stack([covariance_direction(states[layer], each) for each in seeds])
            return as_alike(drawn, torch.stack([*originals.values()]), orthogonal=kind == "orthogonal")

        return directions

    return [replaced(arm, f"{arm.name}: {kind} {index + 1}", draw(index), states) for index in range(count)]


def shuffled_arms(
    arm: Arm, directions: Sequence[Mapping[int, Tensor]], states: Mapping[int, Tensor] | None = None
) -> list[Arm]:
    """Arms with re-extracted directions [hidden] by layer, at the lengths of those that they replace.

    Each vector of an arm takes an extraction of its own: with one for all, a difference of vectors would come to
    nothing. What is left over of the `directions` is not used.
    """
    assert arm.composition is not None
    names = sorted({term.name for term in arm.composition.terms})

    def draw(extracted: Mapping[str, Mapping[int, Tensor]]) -> Replacement:
        return lambda layer, originals: as_alike(
            torch.stack([extracted[name][layer] for name in originals]), torch.stack([*originals.values()])
        )

    return [
        replaced(arm, f"{arm.name}: shuffled {start // len(names) + 1}",
                 draw(dict(zip(names, directions[start:], strict=False))), states)
        for start in range(0, len(directions) - len(names) + 1, len(names))
    ]  # fmt: skip


def donor_arm(arm: Arm, donor: SteeringVector, name: str, states: Mapping[int, Tensor] | None = None) -> Arm:
    """The arm with a donor's directions. Raises ArtifactError where the donor lacks a layer."""
    missing = [layer for layer in acting_layers(arm) if layer not in donor.layers]
    if missing:
        raise ArtifactError(
            f"the donor {name} holds no layer {spans(missing)}, at which {arm.name} acts",
            f"it holds {spans(donor.layers)}; extract it at all layers",
        )

    def directions(layer: int, originals: Mapping[str, Tensor]) -> Tensor:
        along = _along_the_sum(arm, layer, originals)
        return torch.outer(along, donor.layers[layer] / donor.layers[layer].norm().clamp_min(1e-30))

    return replaced(arm, f"{arm.name}: donor {name}", directions, states)


def _along_the_sum(arm: Arm, layer: int, originals: Mapping[str, Tensor]) -> Tensor:
    """How long a vector's replacement must be, float32 [vectors], where one direction replaces them all: the length of
    a single one, the parts of several along what they add up to, so that they add up to the same length."""
    assert arm.composition is not None
    stacked = torch.stack([*originals.values()])
    terms = [term for term in arm.composition.terms if layer in arm.vectors[term.name].acting(term.layers)]
    total = torch.stack([term.value * originals[term.name] for term in terms]).sum(0)
    if len(originals) == 1 or any(term.operation != "add" for term in terms) or not total.any():
        return stacked.norm(dim=1)
    return stacked @ (total / total.norm())
