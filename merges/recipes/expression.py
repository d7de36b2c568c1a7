"""A recipe from an expression over task vectors."""

from __future__ import annotations

from collections.abc import Mapping

from merges.recipes.recipe import Part, Recipe
from vectors.errors import ExpressionError
from vectors.expression import Composition


def from_expression(composition: Composition, files: Mapping[str, str], base: str | None) -> Recipe:
    """`v1 + 0.6*v2 - 0.5*toxic` as task arithmetic; `files` are the vectors by their names.

    Raises ExpressionError for what only steering vectors can do.
    """
    problems = [
        f"{term} is not an addition; task vectors are added, negated and scaled"
        for term in composition.terms
        if term.operation != "add"
    ]
    problems += [
        f"{term} names layers or tokens; a task vector has none"
        for term in composition.terms
        if term.layers or term.scope
    ]
    if problems:
        raise ExpressionError(problems, "write such as: v1 + 0.6*v2 - 0.5*toxic")
    weights: dict[str, float] = {}
    for term in composition.terms:
        weights[term.name] = weights.get(term.name, 0.0) + term.value
    parts = tuple(Part(files[name], name, {"weight": value}) for name, value in weights.items())
    return Recipe("task_arithmetic", parts, base)
