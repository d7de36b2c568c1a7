"""From names to vectors: `--vector NAME=FILE` bindings first, then `NAME.safetensors` in the current folder."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path

from vectors.errors import ExpressionError, SteerError, guess
from vectors.expression import Composition, Term, parse
from vectors.steering import SteeringVector, spans


def compose(
    text: str, bindings: Mapping[str, str | Path | SteeringVector] | None = None, strength: float = 1.0
) -> tuple[Composition, dict[str, SteeringVector]]:
    """An expression, or the path of one vector (at `strength`), with every vector that it names.

    All names that are not found are reported at once. Raises ExpressionError, ArtifactError.
    """
    bindings = dict(bindings or {})
    path = Path(text)
    # os.path answers False where pathlib raises, as for an expression longer than any file name.
    if text not in bindings and os.path.isfile(path):
        if "'" in path.stem and '"' in path.stem:
            raise ExpressionError(f"the file name {path.name} holds both kinds of quotes", "rename the file")
        composition = parse(str(Composition((Term("add", path.stem),))))
        bindings[path.stem] = path
    elif path.suffix in (".safetensors", ".gguf", ".pt") and "*" not in text and "(" not in text:
        raise ExpressionError(f"there is no file {text}", "check the path, or make it with `steer extract`")
    else:
        composition = parse(text)
    vectors: dict[str, SteeringVector] = {}
    problems: list[str] = []
    hints: list[str] = []
    for name in composition.names:
        try:
            vectors[name] = _find(name, bindings)
        except SteerError as error:
            problems += error.problems
            hints.append(error.hint)
    for term in composition.terms:
        if term.name in vectors and term.layers is not None:
            missing = [i for i in term.layers if i not in vectors[term.name].layers]
            if missing:
                problems.append(f"the vector {term.name} holds no layer {spans(missing)}")
                hints.append(f"it holds {spans(vectors[term.name].layers)}")
    if problems:
        raise ExpressionError(problems, "; ".join(dict.fromkeys(hints)))
    return (composition if strength == 1 else composition.scaled(strength)), vectors


def _find(name: str, bindings: Mapping[str, str | Path | SteeringVector]) -> SteeringVector:
    """The vector that a name stands for. Raises ExpressionError, ArtifactError."""
    bound = bindings.get(name)
    if isinstance(bound, SteeringVector):
        return bound
    # A name from an expression never leaves the current folder; only a binding names a path.
    path = Path(bound) if bound is not None else Path(f"{name}.safetensors")
    if bound is None and (path.name != str(path) or not os.path.isfile(path)):
        known = [*bindings, *(file.stem for file in Path().glob("*.safetensors"))]
        raise ExpressionError(
            f"the name {name!r} is not bound, and there is no file {path} here{guess(name, known)}",
            f"bind it: --vector {name}=FILE (a name with signs in it stands in quotes, as 'warm-v2')",
        )
    return SteeringVector.load(path)
