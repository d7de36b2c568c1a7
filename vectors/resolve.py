"""Looking up the vectors and probes that an expression names, in a list of resolvers; the first that knows a name is
used.

By default the resolvers are the `--vector NAME=FILE` bindings, then the versions of the store, then
`NAME.safetensors` in the current folder. A name may stand for a composition, as a version does: its terms take the
place of the name, multiplied by its strength.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vectors import fit
from vectors.errors import ExpressionError, SteerError, collecting, guess, raise_together
from vectors.expression import Composition, Term, parse
from vectors.language.terms import name_text
from vectors.probe import Probe, is_probe
from vectors.registry.layers import spans
from vectors.registry.places import PLACES
from vectors.steering import SteeringVector

Bindings = Mapping[str, str | Path | SteeringVector | Probe]
# Text that can only be a path: no expression has a slash outside of quotes. One before a digit may mean a quotient.
_PATH = re.compile(r"[^\s*()+'\"\[\],@:]*/(?!\s*\d)[^'\"*()]*")
_ALONE = re.compile(r"[\w.:@~-]+")  # what can be the name of a version, without quotes
BIND = "bind it: --vector {name}=FILE (quote a name that contains signs: 'warm-v2')"  # how a command binds a name


class Compound(NamedTuple):
    """A composition that a name stands for, and the files of its vectors by their names in it."""

    composition: Composition
    files: Mapping[str, Path]


class Resolver(NamedTuple):
    """A source of vectors and probes by name.

    `find` returns None for a name that it does not know, and raises ArtifactError for a file that can't be read.
    `names` lists the names that it knows, for suggestions. `compound` is the composition that a name stands for, or
    None; it raises UsageError for a name that stands for something else, such as weights.
    """

    find: Callable[[str], SteeringVector | Probe | None]
    names: Callable[[], list[str]]
    compound: Callable[[str], Compound | None] = lambda name: None


def default_resolvers(folder: Path = Path()) -> list[Resolver]:
    """What names are looked up in, behind the bindings: the places of packages above this one, then a folder."""
    return [*(place() for place in PLACES), folder_resolver(folder)]


class Composed(NamedTuple):
    """A composition, the vectors of its terms by name, and what its conditions read by name."""

    composition: Composition
    vectors: dict[str, SteeringVector]
    probes: dict[str, Probe | SteeringVector]


def compose(
    text: str,
    bindings: Bindings | None = None,
    strength: float = 1.0,
    *,
    resolvers: Sequence[Resolver] | None = None,
    allow_strength: bool = False,
) -> tuple[Composition, dict[str, SteeringVector]]:
    """`compose_gated` for what can't apply conditions, which are refused. Raises ExpressionError."""
    composed = compose_gated(text, bindings, strength, resolvers=resolvers, allow_strength=allow_strength)
    if composed.probes:
        raise ExpressionError(problems_of_gates(composed.composition), UNGATED)
    return composed.composition, composed.vectors


UNGATED = "conditions are applied by steer try, steer eval, steer serve and probes.steered; leave them out here"


def problems_of_gates(composition: Composition) -> list[str]:
    """A problem for every term with a condition, for what can't apply conditions."""
    return [
        f"{term} depends on {term.conditions[0]}, which is known only while the model runs"
        for term in composition.terms
        if term.conditions
    ]


def compose_gated(
    text: str,
    bindings: Bindings | None = None,
    strength: float = 1.0,
    *,
    resolvers: Sequence[Resolver] | None = None,
    allow_strength: bool = False,
    bind: str = BIND,
) -> Composed:
    """Parse an expression, or take the path of one vector, and load every vector and probe that it names.

    Names are looked up in `bindings`, then in `resolvers` in order, by default `default_resolvers`. `strength` scales
    the composition, which is refused where it is far beyond a recommended one (`fit.problems_of_strength`), unless
    `allow_strength` is set. `bind` is the hint about an unknown `{name}`. All problems are reported at once.
    Raises ExpressionError.
    """
    bindings = dict(bindings or {})
    resolvers = default_resolvers() if resolvers is None else resolvers
    composition, compounds = expand(text, bindings, resolvers=resolvers, bind=bind)
    bindings |= compounds
    path = Path(text)
    if text not in bindings and os.path.isfile(path):
        bindings[path.stem] = path
    all_resolvers = [bindings_resolver(bindings), *resolvers]
    vectors: dict[str, SteeringVector] = {}
    probes: dict[str, Probe | SteeringVector] = {}
    problems: list[str] = []
    hints: list[str] = []
    for name in dict.fromkeys((*composition.names, *composition.probes)):
        try:
            source = _find(name, all_resolvers, bind)
        except SteerError as error:
            problems += error.problems
            hints.append(error.hint)
            continue
        if name in composition.probes:
            probes[name] = source
        if isinstance(source, SteeringVector):
            vectors |= {name: source} if name in composition.names else {}
        elif name in composition.names:
            problems.append(f"{name} is a probe, which reads the model; a term needs a vector")
            hints.append(f"a probe stands in a condition: warm@when:{name_text(name)}>0.5")
    if problems and text not in bindings and os.path.isdir(path):  # such as my-model, which reads as a difference
        raise _is_folder(text)
    if problems:
        hints = _quoted_names(text, all_resolvers) or hints
    for term in composition.terms:
        if term.name in vectors and term.layers is not None:
            missing = [i for i in term.layers if i not in vectors[term.name].layers]
            if missing:
                problems.append(f"the vector {term.name} holds no layer {spans(missing)}")
                hints.append(f"it holds {spans(vectors[term.name].layers)}")
    if meanless := fit.problems_of_means(composition, vectors):
        problems += meanless
        hints.append("extract again with `steer extract`, or ablate to zero: ablate(name)")
    unreadable = fit.problems_of_conditions(composition, vectors, probes)
    if unreadable:
        problems += unreadable
        hints.append(
            "a condition needs a probe that was trained without --site, at a layer below every layer that its term "
            "steers, such as anger[10]"
        )
    composition = composition if strength == 1 else composition.scaled(strength)
    excessive = [] if allow_strength else fit.problems_of_strength(composition, vectors)
    if excessive:
        problems += excessive
        hints.append("use a smaller strength, or allow this one: --allow-strength")
    if problems:
        raise ExpressionError(problems, "; ".join(dict.fromkeys(hints)))
    return Composed(composition, vectors, probes)


def expand(
    text: str,
    bindings: Bindings | None = None,
    *,
    resolvers: Sequence[Resolver] | None = None,
    bind: str = BIND,
) -> tuple[Composition, dict[str, Path]]:
    """Parse an expression, and put in place of each name that stands for a composition its terms.

    Returns the files of those terms too. A version is written in quotes, since `@` begins a scope, or alone as it is.
    `bind` is as of `compose_gated`, about a path in place of a name. Raises ExpressionError with all problems.
    """
    bindings = bindings or {}
    resolvers = default_resolvers() if resolvers is None else resolvers
    path = Path(text)
    # os.path answers False where pathlib raises, as for an expression longer than any file name.
    if text not in bindings and os.path.isfile(path):
        if "'" in path.stem and '"' in path.stem:
            raise ExpressionError(f"the file name {path.name} holds both kinds of quotes", "rename the file")
        return parse(str(Composition((Term("add", path.stem),)))), {}
    if text not in bindings and _ALONE.fullmatch(text):
        whole = next((found for each in resolvers if (found := each.compound(text)) is not None), None)
        if whole is not None:
            return whole.composition, dict(whole.files)
    if path.suffix in (".safetensors", ".gguf", ".pt") and "*" not in text and "(" not in text:
        raise ExpressionError(f"there is no file {text}", "check the path, or make it with `steer extract`")
    try:
        composition = parse(text)
    except ExpressionError as error:
        if os.path.isdir(path):
            raise _is_folder(text) from None
        if _PATH.fullmatch(text):
            raise ExpressionError(f"there is no file or folder {text}", "check the path") from None
        if "/" in re.sub(r"'[^']*'|\"[^\"]*\"", "", text):
            hint = f"a file in an expression stands by a name; {bind.replace('{name}', 'NAME')}"
            raise ExpressionError(error.problems, hint) from None
        hints = _quoted_names(text, resolvers)
        raise ExpressionError(error.problems, "; ".join(hints)) if hints else error from None
    return _with_compounds(composition, [bindings_resolver(bindings), *resolvers])


def _with_compounds(composition: Composition, resolvers: Sequence[Resolver]) -> tuple[Composition, dict[str, Path]]:
    """The composition without names that stand for one, and the files of the terms that took their place."""
    errors: list[SteerError] = []
    compounds: dict[str, Compound] = {}
    for name in composition.names:
        with collecting(errors):
            for resolver in resolvers:
                found = resolver.compound(name)
                if found is not None:
                    compounds[name] = found
                if found is not None or name in resolver.names():
                    break
    terms: list[Term] = []
    for term in composition.terms:
        with collecting(errors):
            terms += _terms_of(term, compounds[term.name]) if term.name in compounds else [term]
    raise_together(errors)
    if not compounds:
        return composition, {}
    files = {name: file for found in compounds.values() for name, file in found.files.items()}
    return parse(str(Composition(tuple(terms)))), files


def _terms_of(term: Term, compound: Compound) -> tuple[Term, ...]:
    """The terms that take the place of one. Raises ExpressionError where they can't be what it says."""
    if term.operation != "add" or term.layers is not None:
        what = f"{term.operation} takes one vector" if term.operation != "add" else "layers are given for one vector"
        raise ExpressionError(f"{term.name} stands for {compound.composition}: {what}", "name a vector of it instead")
    scoped = [part.name for part in compound.composition.terms if part.scope is not None]
    if term.scope is not None and scoped:
        raise ExpressionError(
            f"{term.name} can't have the scope {term.scope}: its {', '.join(scoped)} have scopes already",
            "leave out the scope",
        )
    scaled = compound.composition if term.value == 1 else compound.composition.scaled(term.value)
    return tuple(
        replace(
            part,
            scope=part.scope if term.scope is None else term.scope,
            conditions=tuple(dict.fromkeys((*part.conditions, *term.conditions))),
        )
        for part in scaled.terms
    )


def _quoted_names(text: str, resolvers: Sequence[Resolver]) -> list[str]:
    """Hints for names that a text holds without the quotes that they need."""
    known = {name for resolver in resolvers for name in resolver.names()}
    return [
        f"write the name {name} in quotes: '{name}'"
        for name in sorted(known)
        if not name.isidentifier() and name in text and f"'{name}'" not in text
    ]


def _is_folder(text: str) -> ExpressionError:
    return ExpressionError(
        f"{text} is a folder, not a vector or an expression", "a folder is given as the model: --model FOLDER"
    )


def bindings_resolver(bindings: Bindings) -> Resolver:
    """A resolver for the names of `--vector NAME=FILE`; a name is bound to a vector, a probe, or the path of a file."""

    def find(name: str) -> SteeringVector | Probe | None:
        bound = bindings.get(name)
        return bound if bound is None or isinstance(bound, SteeringVector | Probe) else load(bound)

    return Resolver(find, lambda: list(bindings))


def folder_resolver(folder: Path = Path()) -> Resolver:
    """A resolver for `NAME.safetensors` in a folder; names with path separators are not looked up."""

    def find(name: str) -> SteeringVector | Probe | None:
        file = file_of(name, folder)
        return None if file is None else load(file)

    return Resolver(find, lambda: [file.stem for file in folder.glob("*.safetensors")])


def load(path: str | Path) -> SteeringVector | Probe:
    """The vector or the probe in a file. Raises ArtifactError."""
    return Probe.load(path) if is_probe(Path(path)) else SteeringVector.load(path)


def file_of(name: str, folder: Path = Path()) -> Path | None:
    """The file `NAME.safetensors` in a folder; None where it is missing, or where the name holds a path separator."""
    file = Path(f"{name}.safetensors")
    return folder / file if file.name == str(file) and os.path.isfile(folder / file) else None


def _find(name: str, resolvers: Sequence[Resolver], bind: str) -> SteeringVector | Probe:
    """The vector or probe that the first resolver knows by this name. Raises ExpressionError, ArtifactError."""
    for resolver in resolvers:
        source = resolver.find(name)
        if source is not None:
            return source
    suggestions = [known for resolver in resolvers for known in resolver.names()]
    raise ExpressionError(
        f"the name {name!r} is not bound, and there is no file {name}.safetensors here{guess(name, suggestions)}",
        bind.replace("{name}", name),
    )
