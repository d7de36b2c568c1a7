"""What a composition does to the residual stream, as far as weights can do it: constants, and linear maps.

A fold is possible for additions and ablations on every token. A scope or a clamp is none of these: it depends on the
token's place, or pulls the stream towards a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vectors.errors import UsageError
from vectors.expression import Composition
from vectors.steering import SteeringVector, spans

SAME = 1e-6  # how far directions that count as one may differ, in 1 - |cosine|


@dataclass(frozen=True)
class Effects:
    """What is added and what is removed.

    `added` [hidden] float64 by layer; the unit rows of `directions` [k, hidden] float64 are ablated by `strengths` [k]
    at the layers `ablated`, of which the last is what counts.
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
            problems.append(f"{term} acts on some tokens only, and weights act on all")
        elif term.operation == "clamp":
            problems.append(f"{term} sets the stream to a level, which no weight of a block can do")
    if problems:
        raise UsageError(problems, "train it in: --mode distil; or serve it: steer serve")
    added: dict[int, Tensor] = {}
    ablations: dict[str, tuple[float, tuple[int, ...]]] = {}
    for term in composition.terms:
        layers = vectors[term.name].acting(term.layers)
        if term.operation == "add" and term.value != 0:
            for layer in layers:
                move = term.value * vectors[term.name].layers[layer].double()
                added[layer] = added.get(layer, torch.zeros_like(move)) + move
        elif term.operation == "ablate" and term.value != 0:
            before = ablations.get(term.name, (0.0, tuple(layers)))
            if before[1] != tuple(layers):
                problems.append(f"{term.name} is ablated at different layers in two terms")
            ablations[term.name] = (before[0] + term.value, tuple(layers))
    hidden = next(iter(vectors.values())).hidden_size
    directions, strengths, ablated = _ablation(ablations, vectors, hidden, problems)
    if problems:
        raise UsageError(problems, "name one layer: ablate(name[14]); or --mode distil")
    last = ablated[-1] if ablated else -1
    found = Effects(added, directions, strengths, ablated)
    # What is added before the last ablation is ablated too.
    moved = {i: found.apply(move[None])[0] if i < last else move for i, move in sorted(added.items())}
    return Effects({i: move for i, move in moved.items() if bool(move.any())}, directions, strengths, ablated)


def _ablation(
    ablations: Mapping[str, tuple[float, tuple[int, ...]]],
    vectors: Mapping[str, SteeringVector],
    hidden: int,
    problems: list[str],
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Directions, strengths and layers; what weights can't do is added to `problems`."""
    places = {layers for _, layers in ablations.values()}
    if len(places) > 1:
        problems.append(f"the ablations act at different layers: {'; '.join(sorted(spans(p) for p in places))}")
    layers = next(iter(places), ())
    units, strengths = [], []
    for name, (strength, own) in ablations.items():
        moves = torch.stack([vectors[name].layers[i].double() for i in own])
        lengths = moves.norm(dim=1, keepdim=True)
        if not bool(lengths.all()):
            problems.append(f"{name} has no direction at all of the layers {spans(own)}")
            continue
        turned = moves / lengths
        if float((1 - (turned @ turned[-1]).abs()).max()) > SAME:
            problems.append(f"{name} points elsewhere at each of the layers {spans(own)}; weights ablate one direction")
        if len(own) > 1 and strength != 1:
            problems.append(f"{name} is ablated by {strength:g} at several layers in turn, and weights act once")
        units.append(turned[-1])
        strengths.append(strength)
    if len(units) > 1 and len(layers) > 1:
        cosines = torch.stack(units) @ torch.stack(units).T - torch.eye(len(units), dtype=torch.float64)
        if float(cosines.abs().max()) > SAME:
            problems.append("directions that are not orthogonal are ablated at several layers in turn")
    empty = torch.zeros(0, hidden, dtype=torch.float64)
    stacked = torch.stack(units) if units else empty
    return stacked, torch.tensor(strengths, dtype=torch.float64), tuple(sorted(layers))
