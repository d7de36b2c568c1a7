"""The effects of a composition on the residual stream that weights can express: constants, and linear maps.

A fold is possible for additions and ablations on every token. It is not for scopes, which depend on the token's
position, nor for clamps, which set the stream to a level, nor for shares of a norm and rotations, which are not linear.
An ablation to the mean is one to zero, and the addition of the mean: at one layer, since at several the next one would
ablate what the one before has added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vectors.errors import UsageError
from vectors.expression import Composition
from vectors.registry.layers import spans
from vectors.steering import SteeringVector

# The operations that no linear map and no constant express, with what they do.
UNFOLDED = {
    "clamp": "sets the stream to a level",
    "share": "adds a share of the token's norm",
    "rotate": "turns the stream by an angle that keeps its norm",
}
SAME = 1e-6  # directions with 1 - |cosine| up to this count as equal


@dataclass(frozen=True)
class Effects:
    """Additions and ablations.

    `added` [hidden] float64 by layer; the unit rows of `directions` [k, hidden] float64 are ablated by `strengths` [k]
    at the layers `ablated`. Weights ablate every write up to the last of these layers.
    """

    added: Mapping[int, Tensor]
    directions: Tensor
    strengths: Tensor
    ablated: tuple[int, ...]

    @property
    def ablates(self) -> bool:
        """Whether there is anything to ablate."""
        return bool(self.ablated)

    @property
    def last(self) -> int:
        """The last layer at which something is ablated."""
        return self.ablated[-1]

    def apply(self, rows: Tensor) -> Tensor:
        """The ablation of rows [n, hidden] float64: h - sum_k s_k <h, u_k> u_k."""
        return rows - ((rows @ self.directions.T) * self.strengths) @ self.directions


def effects_of(composition: Composition, vectors: Mapping[str, SteeringVector]) -> Effects:
    """The effects of a composition. Raises UsageError with every term that can't be folded."""
    problems = []
    for term in composition.terms:
        if term.scope is not None:
            problems.append(f"{term} acts on some tokens only, but weights act on all")
        elif term.operation in UNFOLDED:
            problems.append(f"{term} {UNFOLDED[term.operation]}, which the weights of a block can't do")
    if problems:
        raise UsageError(problems, "train it in: --mode distil; or serve it: steer serve")
    added: dict[int, Tensor] = {}
    ablations: dict[str, tuple[float, tuple[int, ...]]] = {}
    for term in composition.terms:
        layers = vectors[term.name].acting(term.layers)
        if term.operation == "add" and term.value != 0:
            for layer in layers:
                addition = term.value * vectors[term.name].layers[layer].double()
                added[layer] = added.get(layer, torch.zeros_like(addition)) + addition
        elif term.operation in ("ablate", "mean_ablate") and term.value != 0:
            if term.operation == "mean_ablate" and len(layers) > 1:
                problems.append(f"{term} sets the mean at layers {spans(layers)} in turn, but weights act once")
            elif term.operation == "mean_ablate":
                (layer,) = layers
                mean = (
                    (vectors[term.name].mean_at(layer) or 0.0) * term.value * vectors[term.name].layers[layer].double()
                )
                added[layer] = added.get(layer, torch.zeros_like(mean)) + mean
            earlier = ablations.get(term.name, (0.0, tuple(layers)))
            if earlier[1] != tuple(layers):
                problems.append(f"{term.name} is ablated at different layers in two terms")
            ablations[term.name] = (earlier[0] + term.value, tuple(layers))
    hidden = next(iter(vectors.values())).hidden_size
    directions, strengths, ablated = _ablation(ablations, vectors, hidden, problems)
    if problems:
        raise UsageError(problems, "name one layer: ablate(name[14]); or --mode distil")
    last = ablated[-1] if ablated else -1
    effects = Effects(added, directions, strengths, ablated)
    # Additions before the last ablated layer are ablated too.
    remaining = {i: effects.apply(row[None])[0] if i < last else row for i, row in sorted(added.items())}
    return Effects({i: row for i, row in remaining.items() if bool(row.any())}, directions, strengths, ablated)


def _ablation(
    ablations: Mapping[str, tuple[float, tuple[int, ...]]],
    vectors: Mapping[str, SteeringVector],
    hidden: int,
    problems: list[str],
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The directions, strengths and layers of `Effects`; appends to `problems` what weights can't do."""
    layer_sets = {layers for _, layers in ablations.values()}
    if len(layer_sets) > 1:
        problems.append(f"the ablations act at different layers: {'; '.join(sorted(spans(p) for p in layer_sets))}")
    layers = next(iter(layer_sets), ())
    units, strengths = [], []
    for name, (strength, acting) in ablations.items():
        by_layer = torch.stack([vectors[name].layers[i].double() for i in acting])
        lengths = by_layer.norm(dim=1, keepdim=True)
        if not bool(lengths.all()):
            problems.append(f"{name} is zero at some of the layers {spans(acting)}, so it has no direction there")
            continue
        layer_units = by_layer / lengths
        if float((1 - (layer_units @ layer_units[-1]).abs()).max()) > SAME:
            problems.append(
                f"{name} differs in direction between the layers {spans(acting)}; weights ablate one direction"
            )
        if len(acting) > 1 and strength != 1:
            problems.append(f"{name} is ablated by {strength:g} at several layers in turn, but weights act once")
        units.append(layer_units[-1])
        strengths.append(strength)
    if len(units) > 1 and len(layers) > 1:
        cosines = torch.stack(units) @ torch.stack(units).T - torch.eye(len(units), dtype=torch.float64)
        if float(cosines.abs().max()) > SAME:
            problems.append("directions that are not orthogonal are ablated at several layers in turn")
    empty = torch.zeros(0, hidden, dtype=torch.float64)
    stacked = torch.stack(units) if units else empty
    return stacked, torch.tensor(strengths, dtype=torch.float64), tuple(sorted(layers))
