"""A recipe: what is merged, how, with which numbers; from the command line, from YAML, from a finished merge.

    method: ties
    base: org/base
    models:
      - model: org/poet
        weight: 1
        density: [0.1, 0.4]              # a gradient over the layers
      - model: toxic.safetensors         # a task vector, an adapter's folder, or another model
        name: toxic
        weight:
          - {filter: "*.mlp.*", value: 0}
          - {value: -0.5}
    parameters: {lambda: 1.0, elect: after}
    scope: global                        # or tensor
    seed: 0
    dtype: bfloat16                      # of the result; without it, the base's
    as: model                            # or vector
    slices: ...                          # see merges/recipes/slices.py
    tokenizer: ...                       # see merges/recipes/vocabulary.py
    chat_template: auto                  # what most models have; or chatml, llama3, ..., or a Jinja text

Unknown keys are errors. mergekit's files, known by their `merge_method`, are read by merges/recipes/mergekit.py.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merges import methods
from merges.recipes.chat_templates import NAMED
from merges.recipes.parameters import problems_of_value, with_numbers
from vectors import values
from vectors.errors import UsageError, guess
from vectors.files import digest_json
from vectors.options import Option

DTYPES = ("auto", "float32", "bfloat16", "float16")
SCOPES = ("tensor", "global")
KEYS = (
    "method",
    "base",
    "models",
    "parameters",
    "scope",
    "seed",
    "dtype",
    "as",
    "slices",
    "tokenizer",
    "chat_template",
)
SLICE_KEYS = ("sources", "base", "parameters")
SOURCE_KEYS = ("model", "layers", "parameters")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "token", "force")


@dataclass(frozen=True)
class Part:
    """One input: its reference, the name by which it is called, and its own numbers."""

    model: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how: an immutable value with one canonical form and one digest."""

    method: str
    parts: tuple[Part, ...]
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "tensor"
    seed: int = 0
    dtype: str = "auto"
    as_: str = "model"
    slices: tuple[Mapping[str, Any], ...] = ()
    tokenizer: Mapping[str, Any] | None = None
    chat_template: str | None = None

    def value(self) -> dict[str, Any]:
        """The recipe as JSON, as `parse` reads it."""
        found: dict[str, Any] = {
            "method": self.method,
            "models": [{"model": part.model, "name": part.name, **part.options} for part in self.parts],
            "parameters": dict(self.options),
            "scope": self.scope,
            "seed": self.seed,
            "dtype": self.dtype,
            "as": self.as_,
        }
        if self.base:
            found["base"] = self.base
        if self.slices:
            found["slices"] = [dict(entry) for entry in self.slices]
        if self.tokenizer:
            found["tokenizer"] = dict(self.tokenizer)
        if self.chat_template:
            found["chat_template"] = self.chat_template
        return found

    @property
    def digest(self) -> str:
        """`sha256:` of the canonical form."""
        return digest_json(self.value())

    def renamed(self, references: Mapping[str, str]) -> Recipe:
        """The recipe with other references for its models, wherever it names them."""

        def new(reference: Any) -> Any:
            return references.get(reference, reference)

        slices = [
            {**entry, "sources": [{**source, "model": new(source["model"])} for source in entry["sources"]]}
            | ({"base": new(entry["base"])} if entry.get("base") else {})
            for entry in self.slices
        ]
        tokenizer = dict(self.tokenizer) if self.tokenizer else None
        if tokenizer:
            tokenizer["source"] = new(tokenizer.get("source", "union"))
            tokens = (tokenizer.get("tokens") or {}).items()
            tokenizer["tokens"] = {token: {**entry, "source": new(entry["source"])} for token, entry in tokens}
        parts = tuple(replace(part, model=new(part.model)) for part in self.parts)
        return replace(self, parts=parts, base=new(self.base), slices=tuple(slices), tokenizer=tokenizer)

    def without(self, name: str) -> Recipe:
        """The recipe that never had this input. Raises UsageError for a name that it has not."""
        kept = tuple(part for part in self.parts if part.name != name)
        if len(kept) == len(self.parts):
            names = [part.name for part in self.parts]
            raise UsageError(f"the recipe has no input {name!r}{guess(name, names)}", f"it has {', '.join(names)}")
        return replace(self, parts=kept)


def names_for(references: list[str]) -> list[str]:
    """A short name for each reference: the file's or folder's own, numbered where two are alike."""
    names: list[str] = []
    for reference in references:
        stem = Path(reference.partition("@")[0].rstrip("/")).name.removesuffix(".safetensors") or reference
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def extras(recipe: Recipe, part: Part) -> dict[str, Path]:
    """The files of statistics that an input brings beside its weights, by what they hold."""
    wanted = [statistic.name for statistic in methods.find(recipe.method).statistics]
    return {name: Path(os.path.expanduser(str(part.options[name]))) for name in wanted if name in part.options}


def check(recipe: Recipe) -> list[str]:
    """Everything that is wrong with a recipe by itself, before any file is looked at."""
    problems: list[str] = []
    known = methods.available()
    if recipe.method not in known:
        return [f"there is no merge method {recipe.method!r}{guess(recipe.method, known)}"]
    method = known[recipe.method]
    options: dict[str, Option] = {option.name: option for option in method.options}
    extras = [statistic.name for statistic in method.statistics]
    for where, given, own in [
        ("parameters", recipe.options, False),
        *((f"the input {part.name}", part.options, True) for part in recipe.parts),
    ]:
        for key, value in given.items():
            if key in extras and own:
                if not isinstance(value, str):
                    problems.append(f"{where}: {key} is {value!r}, not the name of a file")
            elif key not in options:
                problems.append(f"{where}: {recipe.method} has no option {key!r}{guess(key, [*options, *extras])}")
            elif own and not options[key].each:
                problems.append(f"{where}: {key} is one for all inputs; write it under parameters")
            else:
                problems += problems_of_value(options[key], value, where)
    for number, entry in enumerate(recipe.slices, 1):
        for given in [entry.get("parameters") or {}, *(source.get("parameters") or {} for source in entry["sources"])]:
            for key, value in given.items():
                if key not in options:
                    problems.append(f"slice {number}: {recipe.method} has no option {key!r}{guess(key, options)}")
                else:
                    problems += problems_of_value(options[key], value, f"slice {number}")
    for part in recipe.parts:
        problems += [
            f"the input {part.name} needs {name}, a file of statistics" for name in extras if name not in part.options
        ]
    least, most = method.inputs
    count = len(recipe.parts)
    if not recipe.slices and (count < least or (most is not None and count > most)):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        problems.append(f"{recipe.method} takes {wanted} inputs; there {'is' if count == 1 else 'are'} {count}")
    names = [part.name for part in recipe.parts]
    for reference in (*(part.model for part in recipe.parts), *names, recipe.base or ""):
        try:
            reference.encode()
        except UnicodeEncodeError:
            problems.append(f"the name {reference!r} is no UTF-8, so no record can hold it")
    problems += [f"two inputs are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if method.base == "unused" and recipe.base and recipe.as_ != "vector" and method.space == "delta":
        problems.append(f"{recipe.method} uses no base")
    for word, value, allowed in [
        ("scope", recipe.scope, SCOPES),
        ("dtype", recipe.dtype, DTYPES),
        ("as", recipe.as_, ("model", "vector")),
    ]:
        if value not in allowed:
            problems.append(f"{word} is {value!r}, not {' or '.join(allowed)}{guess(str(value), allowed)}")
    template = recipe.chat_template or "auto"
    if template not in ("auto", *NAMED) and "{" not in template:
        words = ("auto", *NAMED)
        said = f"chat_template is {template!r}, not {', '.join(words)} or a Jinja text"
        problems.append(f"{said}{guess(template, words)}")
    if recipe.as_ == "vector" and (recipe.slices or recipe.tokenizer):
        what = "slices" if recipe.slices else "another vocabulary"
        problems.append(f"a model with {what} is no vector for its base, so as: vector can't be")
    if recipe.scope == "global" and not method.global_scope:
        problems.append(f"{recipe.method} counts nothing over the whole model, so it has no scope: global")
    if "weight" in options and recipe.parts:
        weights = [
            part.options.get("weight", recipe.options.get("weight", options["weight"].default)) for part in recipe.parts
        ]
        if all(not isinstance(weight, list) and weight == 0 for weight in weights):
            problems.append("all weights are zero, so nothing would be merged")
        elif method.divides_by_weights(recipe.options) and not any(isinstance(w, list) for w in weights):
            try:
                if abs(sum(weights)) < 1e-12:
                    problems.append(f"the weights sum to zero, and {recipe.method} divides by their sum")
            except TypeError:
                pass  # reported above as no number
    return problems


def parse(value: Any, where: str = "the recipe") -> Recipe:
    """A recipe from what YAML or JSON hold. Every unknown key and bad value is reported. Raises UsageError."""
    from merges.recipes import mergekit

    if not isinstance(value, dict):
        raise UsageError(f"{where} is no mapping", "see docs/merge.md")
    if "merge_method" in value:
        return mergekit.parse(value, where)
    problems = _unknown(value, KEYS, where)
    models = value.get("models") or []
    if not isinstance(models, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("model"), str) for entry in models
    ):
        problems.append(f"{where}: models is no list of entries with a model")
        models = []
    problems += [
        f"{where}: the key {key!r} of {entry['model']} is no word"
        for entry in models
        for key in entry
        if not isinstance(key, str)
    ]
    slices = value.get("slices") or []
    problems += _slice_problems(slices, where)
    if "method" not in value:
        problems.append(f"{where} has no method")
    if not models and not slices:
        problems.append(f"{where} has no models")
    parameters = value.get("parameters") or {}
    if not _words(parameters):
        problems.append(f"{where}: parameters is no mapping")
    problems += _tokenizer_problems(value.get("tokenizer"), where)
    for key in ("method", "base", "scope", "dtype", "as", "chat_template"):
        if value.get(key) is not None and not isinstance(value[key], str):
            problems.append(f"{where}: {key} is {value[key]!r}, not a word")
    seed = values.number(value.get("seed", 0))
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(f"{where}: seed is {value['seed']!r}, not a whole number")
    if problems:
        raise UsageError(problems, "see docs/merge.md for what a recipe holds")
    read = _reader(value["method"])
    short = names_for([entry["model"] for entry in models])
    parts = tuple(
        Part(
            entry["model"],
            str(entry.get("name", name)),
            read({k: v for k, v in entry.items() if k not in ("model", "name")}),
        )
        for entry, name in zip(models, short, strict=True)
    )
    return Recipe(
        value["method"],
        parts,
        value.get("base"),
        read(parameters),
        value.get("scope") or "tensor",
        seed,
        value.get("dtype") or "auto",
        value.get("as") or "model",
        tuple(_slice(entry, read) for entry in slices),
        value.get("tokenizer"),
        value.get("chat_template"),
    )


def _reader(method: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What reads the options of a method: a number for each text that is one, where the option takes numbers."""
    module = methods.available().get(method)
    options = {option.name: option for option in module.OPTIONS} if module is not None else {}
    return lambda given: {k: with_numbers(options[k], v) if k in options else v for k, v in given.items()}


def _slice(entry: Mapping[str, Any], read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    def with_read(part: Mapping[str, Any]) -> dict[str, Any]:
        return {**part, "parameters": read(part["parameters"])} if part.get("parameters") else dict(part)

    return {**with_read(entry), "sources": [with_read(source) for source in entry["sources"]]}


def _words(value: Any) -> bool:
    """Whether a value is a mapping whose keys are text."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _unknown(value: Mapping[Any, Any], known: tuple[str, ...], where: str, place: str = "") -> list[str]:
    return [f"{where}: unknown key {key!r}{place}{guess(str(key), known)}" for key in value if key not in known]


def _tokenizer_problems(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, dict):
        return [f"{where}: tokenizer is no mapping with a source"]
    problems = _unknown(value, TOKENIZER_KEYS, where, " in tokenizer")
    multiple, tokens = value.get("pad_to_multiple_of", 1), value.get("tokens") or {}
    if not isinstance(multiple, int) or multiple < 1:
        problems.append(f"{where}: pad_to_multiple_of is {multiple!r}, not a whole number from 1 on")
    if not _words(tokens):
        return [*problems, f"{where}: tokens is no mapping from tokens"]
    for token, entry in tokens.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            problems.append(f"{where}: the token {token!r} has no source")
            continue
        problems += _unknown(entry, TOKEN_KEYS, where, f" in the token {token!r}")
        other = entry.get("token", "")
        if (
            isinstance(other, bool)
            or not isinstance(other, str | int)
            or not isinstance(entry.get("force", True), bool)
        ):
            problems.append(
                f"{where}: the token {token!r} has a `token` that is none, or a `force` that is not a truth"
            )
    return problems


def _slice_problems(slices: Any, where: str) -> list[str]:
    if not isinstance(slices, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sources"), list) and entry["sources"] for entry in slices
    ):
        return [f"{where}: slices is no list of entries with sources"]
    problems = []
    for number, entry in enumerate(slices, 1):
        problems += _unknown(entry, SLICE_KEYS, where, f" in slice {number}")
        for source in entry["sources"]:
            if not isinstance(source, dict):
                problems.append(f"{where}: a source of slice {number} is {source!r}, not a mapping")
                continue
            problems += _unknown(source, SOURCE_KEYS, where, f" in a source of slice {number}")
            layers = source.get("layers")
            good = isinstance(layers, list) and len(layers) == 2 and all(isinstance(i, int) for i in layers)
            if not isinstance(source.get("model"), str):
                problems.append(f"{where}: a source of slice {number} names no model")
            if not good or not isinstance(layers, list) or not 0 <= layers[0] < layers[1]:
                problems.append(f"{where}: a source of slice {number} has layers {layers!r}, not [first, last + 1]")
        if not isinstance(entry.get("base", ""), str):
            problems.append(f"{where}: base of slice {number} is {entry['base']!r}, not a model")
        for given in [entry, *(source for source in entry["sources"] if isinstance(source, dict))]:
            if not _words(given.get("parameters") or {}):
                problems.append(f"{where}: parameters of slice {number} is no mapping")
        named = [str(source.get("model")) for source in entry["sources"] if isinstance(source, dict)]
        problems += [
            f"{where}: slice {number} names {name} twice" for name in sorted({n for n in named if named.count(n) > 1})
        ]
    return problems


def read(path: Path) -> Recipe:
    """A recipe from a YAML file, ours or mergekit's, or from the record of a finished merge. Raises UsageError."""
    import yaml

    try:
        value = values.load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} can't be read as YAML: {' '.join(str(error).split())}", "check the file") from error
    if isinstance(value, dict) and "recipe" in value and "outputs" in value:
        value = value["recipe"]
    recipe = parse(value, str(path))
    problems = check(recipe)
    if problems:
        raise UsageError([f"{path}: {problem}" for problem in problems], "see `steer merge --methods`")
    return recipe


def refuse(recipe: Recipe) -> None:
    """Raise UsageError with everything that is wrong with a recipe by itself."""
    problems = check(recipe)
    if problems:
        raise UsageError(problems, "see `steer merge --methods`")
