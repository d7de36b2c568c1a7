"""Which way a composition gets into the weights, and why: by folding where algebra allows it, else by distillation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merges.pool import Pool
from merges.sources import open_source
from steer.baking import routes
from steer.baking.draft import draft_of
from steer.baking.effects import effects_of
from steer.baking.fold import NOTHING, plan
from vectors.errors import ModelError, UsageError
from vectors.resolve import compose
from vectors.steering import SteeringVector


def choose(
    composition: str, model: str, vectors: Mapping[str, str | Path | SteeringVector] | None, via: str = "auto"
) -> tuple[str, str]:
    """`fold` or `distil`, and the reason, from headers alone. Raises ExpressionError, UsageError, ModelError."""
    parsed, found = compose(composition, vectors)
    if all(term.operation != "clamp" and term.value == 0 for term in parsed.terms):
        raise UsageError(NOTHING, "give it a strength other than 0")
    if via != "auto":
        routes.find(via)
    source = open_source(model)
    try:
        effects = effects_of(parsed, found)
        with Pool(1) as pool:
            plan(draft_of(source, pool), effects, via)
    except (UsageError, ModelError) as error:
        return "distil", f"it can't be folded: {'; '.join(error.problems)}"
    return "fold", "weights can do it exactly"
