"""Looking up the vectors that an expression names, in a list of resolvers; the first that knows a name is used.

By default the resolvers are the `--vector NAME=FILE` bindings, then `NAME.safetensors` in the current folder.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vectors import fit
from vectors.errors import ExpressionError, SteerError, guess
from vectors.expression import Composition, Term, parse
from vectors.registry.layers import spans
from vectors.steering import SteeringVector


class Resolver(NamedTuple):
    """A source of vectors by name.

    `find` returns None for a name that it does not know, and raises ArtifactError for a vector that can't be read.
    `names` lists the names that it knows, for suggestions.
    """

    find: Callable[[str], SteeringVector | None]
    names: Callable[[], list[str]]


def compose(
    text: str,
    bindings: Mapping[str, str | Path | SteeringVector] | None = None,
    strength: float = 1.0,
    *,
    resolvers: Sequence[Resolver] | None = None,
    allow_strength: bool = False,
) -> tuple[Composition, dict[str, SteeringVector]]:
    """Parse an expression, or take the path of one vector, and load every vector that it names.

    Names are looked up in `bindings`, then in `resolvers` in order, by default in the current folder. `strength` scales
    the composition, which is refused where it is far beyond a recommended one (`fit.problems_of_strength`), unless
    `allow_strength` is set. All problems are reported at once. Raises ExpressionError.
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
        try:
            composition = parse(text)
        except ExpressionError:
            if os.path.isdir(path):
                raise _is_folder(text) from None
            raise
    all_resolvers = [bindings_resolver(bindings), *([folder_resolver()] if resolvers is None else resolvers)]
    vectors: dict[str, SteeringVector] = {}
    problems: list[str] = []
    hints: list[str] = []
    for name in composition.names:
        try:
            vectors[name] = _find(name, all_resolvers)
        except SteerError as error:
            problems += error.problems
            hints.append(error.hint)
    if problems and text not in bindings and os.path.isdir(path):  # such as my-model, which reads as a difference
        raise _is_folder(text)
    if problems:
        known = {name for resolver in all_resolvers for name in resolver.names()}
        quoted = sorted(name for name in known if not name.isidentifier() and name in text and f"'{name}'" not in text)
        hints = [f"write the name {name} in quotes: '{name}'" for name in quoted] or hints
    for term in composition.terms:
        if term.name in vectors and term.layers is not None:
            missing = [i for i in term.layers if i not in vectors[term.name].layers]
            if missing:
                problems.append(f"the vector {term.name} holds no layer {spans(missing)}")
                hints.append(f"it holds {spans(vectors[term.name].layers)}")
    composition = composition if strength == 1 else composition.scaled(strength)
    excessive = [] if allow_strength else fit.problems_of_strength(composition, vectors)
    if excessive:
        problems += excessive
        hints.append("use a smaller strength, or allow this one: --allow-strength")
    if problems:
        raise ExpressionError(problems, "; ".join(dict.fromkeys(hints)))
    return composition, vectors


def _is_folder(text: str) -> ExpressionError:
    return ExpressionError(
        f"{text} is a folder, not a vector or an expression", "a folder is given as the model: --model FOLDER"
    )


def bindings_resolver(bindings: Mapping[str, str | Path | SteeringVector]) -> Resolver:
    """A resolver for the names of `--vector NAME=FILE`; a name is bound to a vector or to the path of its file."""

    def find(name: str) -> SteeringVector | None:
        bound = bindings.get(name)
        return bound if bound is None or isinstance(bound, SteeringVector) else SteeringVector.load(bound)

    return Resolver(find, lambda: list(bindings))


def folder_resolver(folder: Path = Path()) -> Resolver:
    """A resolver for `NAME.safetensors` in a folder; names with path separators are not looked up."""

    def find(name: str) -> SteeringVector | None:
        file = file_of(name, folder)
        return None if file is None else SteeringVector.load(file)

    return Resolver(find, lambda: [file.stem for file in folder.glob("*.safetensors")])


def file_of(name: str, folder: Path = Path()) -> Path | None:
    """The file `NAME.safetensors` in a folder; None where it is missing, or where the name holds a path separator."""
    file = Path(f"{name}.safetensors")
    return folder / file if file.name == str(file) and os.path.isfile(folder / file) else None


def _find(name: str, resolvers: Sequence[Resolver]) -> SteeringVector:
    """The vector that the first resolver knows by this name. Raises ExpressionError, ArtifactError."""
    for resolver in resolvers:
        vector = resolver.find(name)
        if vector is not None:
            return vector
    suggestions = [known for resolver in resolvers for known in resolver.names()]
    raise ExpressionError(
        f"the name {name!r} is not bound, and there is no file {name}.safetensors here{guess(name, suggestions)}",
        f"bind it: --vector {name}=FILE (quote a name that contains signs: 'warm-v2')",
    )
