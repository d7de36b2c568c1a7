"""The recipe for an expression over task vectors, or for a single vector."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path

from merges.inputs import locations
from merges.recipes.recipe import Part, Recipe
from vectors.errors import ExpressionError
from vectors.expression import Composition, Term, parse

SUFFIXES = (".safetensors", ".gguf", ".pt")  # of vector files


def from_expression(composition: Composition, files: Mapping[str, str], base: str | None) -> Recipe:
    """An expression such as `v1 + 0.6*v2 - 0.5*toxic` as task arithmetic; `files` are the vectors by name.

    Raises ExpressionError for operations, layers, scopes and conditions, which only steering vectors have.
    """
    problems = [
        f"{term} is not possible: task vectors can only be added, subtracted and scaled"
        for term in composition.terms
        if term.operation != "add"
    ]
    problems += [
        f"{term} has layers, a scope or a condition, which task vectors do not have"
        for term in composition.terms
        if term.layers or term.scope
    ]
    if problems:
        raise ExpressionError(problems, "an example of an expression: v1 + 0.6*v2 - 0.5*toxic")
    weights: dict[str, float] = {}
    for term in composition.terms:
        weights[term.name] = weights.get(term.name, 0.0) + term.value
    parts = tuple(Part(files[name], name, {"weight": value}) for name, value in weights.items())
    return Recipe("task_arithmetic", parts, base)


def read(text: str, files: Mapping[str, str | Path], base: str | None) -> Recipe:
    """The recipe for the path of a vector, the folder of an adapter, or an expression over names.

    A name stands for its file in `files`, or else NAME.safetensors in the current folder. Raises ExpressionError with
    all names for which there is neither.
    """
    path = Path(text)
    if text not in files and (_is_vector(path) or locations.adapter(text) is not None):
        name = path.name.removesuffix(".safetensors") or "vector"
        return from_expression(Composition((Term("add", name),)), {name: text}, base)
    if path.suffix in SUFFIXES and "*" not in text and " " not in text:
        raise ExpressionError(f"there is no file {text}", "check the path, or make it with `steer diff`")
    composition = parse(text)
    paths, problems = {}, []
    for name in composition.names:
        file = Path(files.get(name, f"{name}.safetensors"))
        if name not in files and not _is_vector(file):
            problems.append(f"the name {name!r} is not bound, and there is no file {file} here")
        paths[name] = str(file)
    if problems:
        raise ExpressionError(problems, "bind them: --vector NAME=FILE")
    return from_expression(composition, paths, base)


def _is_vector(path: Path) -> bool:
    """Whether there is a vector at this path: a single file, or several with an index."""
    return os.path.isfile(path) or os.path.isfile(f"{path}.index.json")  # pathlib raises for a name that is too long
