"""The choice of a bake mode, and its reason: folding where algebra allows it, else distillation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merges.engine.pool import Pool
from merges.inputs.sources import open_source
from steer.folding import injections
from steer.folding.effects import effects_of
from steer.folding.fold import NOTHING, plan
from steer.folding.pending import pending_from
from vectors.errors import ModelError, UsageError
from vectors.resolve import compose
from vectors.steering import SteeringVector


def choose(
    composition: str, model: str, vectors: Mapping[str, str | Path | SteeringVector] | None, via: str = "auto"
) -> tuple[str, str]:
    """`fold` or `distil`, and the reason; reads headers only. Raises ExpressionError, UsageError, ModelError."""
    parsed, bound = compose(composition, vectors, allow_strength=True)  # the bake itself refuses a strength
    if all(term.operation != "clamp" and term.value == 0 for term in parsed.terms):
        raise UsageError(NOTHING, "give it a strength other than 0")
    if via != "auto":
        injections.find(via)
    source = open_source(model)
    try:
        effects = effects_of(parsed, bound)
        with Pool(1) as pool:
            plan(pending_from(source, pool), effects, via)
    except (UsageError, ModelError) as error:
        return "distil", f"it can't be folded: {'; '.join(error.problems)}"
    return "fold", "weights can express it exactly"
