"""A recipe: the inputs of a merge, its method and all options, from the command line, YAML or a finished merge.

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
    dtype: bfloat16                      # of the result; by default the base's
    as: model                            # or vector
    slices: ...                          # see merges/recipes/slices.py
    tokenizer: ...                       # see merges/recipes/vocabulary.py
    allow_config: [rope_theta]           # settings of the configurations that may differ
    required: [weight]                   # options that have no default here, as in mergekit
    chat_template: auto                  # the one most inputs have; or chatml, llama3, ..., or a Jinja template

`merges/recipes/document.py` reads such a document, `merges/recipes/validation.py` checks it.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merges import methods
from vectors.errors import UsageError, guess
from vectors.storage.files import digest_json


@dataclass(frozen=True)
class Part:
    """One input: `model` is its reference, `name` what messages call it, `options` those of this input."""

    model: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SliceSource:
    """The layers [first, last + 1) of one model, and the options of that model in this slice."""

    model: str
    layers: tuple[int, int]
    parameters: Mapping[str, Any] | None = None

    def value(self) -> dict[str, Any]:
        """The source as JSON."""
        parameters = {} if self.parameters is None else {"parameters": dict(self.parameters)}
        return {"model": self.model, "layers": list(self.layers)} | parameters


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, from one model or merged from several; see merges/recipes/slices.py.

    A slice of a document that could not be read has no sources.
    """

    sources: tuple[SliceSource, ...]
    base: str | None = None  # of this slice; None: the recipe's
    parameters: Mapping[str, Any] | None = None

    def value(self) -> dict[str, Any]:
        """The slice as JSON."""
        value: dict[str, Any] = {"sources": [source.value() for source in self.sources]}
        if self.base:
            value["base"] = self.base
        if self.parameters is not None:
            value["parameters"] = dict(self.parameters)
        return value


@dataclass(frozen=True)
class TokenSource:
    """The source of a token's embedding row: a model or `zero`, and there another `token`, by text or id."""

    source: str
    token: str | int | None = None
    force: bool | None = None  # False: only for inputs that lack the token; default: for all

    def value(self) -> dict[str, Any]:
        """The source of the token as JSON."""
        optional = {"token": self.token, "force": self.force}
        return {"source": self.source} | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of the result; see merges/recipes/vocabulary.py."""

    source: str = "union"  # or base, or the reference of a model
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def value(self) -> dict[str, Any]:
        """The request as JSON."""
        value: dict[str, Any] = {"source": self.source}
        value["tokens"] = {token: source.value() for token, source in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            value["pad_to_multiple_of"] = self.pad_to_multiple_of
        return value


@dataclass(frozen=True)
class Recipe:
    """The inputs and options of a merge: an immutable value with one canonical form and one digest."""

    method: str
    parts: tuple[Part, ...]
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "tensor"
    seed: int = 0
    dtype: str = "auto"
    as_: str = "model"
    slices: tuple[Slice, ...] = ()
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    allow_config: tuple[str, ...] = ()  # fields of the configuration in which the inputs may differ
    required: tuple[str, ...] = ()  # options without a default: every tensor must have a value
    notes: tuple[str, ...] = field(default=(), compare=False)  # for the user, about the document it came from
    problems: tuple[str, ...] = field(default=(), compare=False)  # of that document, for which the recipe is refused

    def value(self) -> dict[str, Any]:
        """The recipe as JSON, as merges.recipes.document.parse reads it."""
        value: dict[str, Any] = {
            "method": self.method,
            "models": [{"model": part.model, "name": part.name, **part.options} for part in self.parts],
            "parameters": dict(self.options),
            "scope": self.scope,
            "seed": self.seed,
            "dtype": self.dtype,
            "as": self.as_,
        }
        if self.base:
            value["base"] = self.base
        if self.slices:
            value["slices"] = [entry.value() for entry in self.slices]
        if self.tokenizer is not None:
            value["tokenizer"] = self.tokenizer.value()
        if self.chat_template:
            value["chat_template"] = self.chat_template
        if self.allow_config:
            value["allow_config"] = list(self.allow_config)
        if self.required:
            value["required"] = list(self.required)
        return value

    @property
    def digest(self) -> str:
        """`sha256:` of the canonical form."""
        return digest_json(self.value())

    def renamed(self, references: Mapping[str, str]) -> Recipe:
        """The recipe with the references of its models replaced everywhere, by `references` from old to new."""

        def new(reference: Any) -> Any:
            return references.get(reference, reference)

        slices = tuple(
            replace(
                entry,
                sources=tuple(replace(source, model=new(source.model)) for source in entry.sources),
                base=new(entry.base),
            )
            for entry in self.slices
        )
        tokenizer = self.tokenizer
        if tokenizer is not None:
            tokens = {token: replace(entry, source=new(entry.source)) for token, entry in tokenizer.tokens.items()}
            tokenizer = replace(tokenizer, source=new(tokenizer.source), tokens=tokens)
        parts = tuple(replace(part, model=new(part.model)) for part in self.parts)
        return replace(self, parts=parts, base=new(self.base), slices=slices, tokenizer=tokenizer)

    def without(self, *names: str) -> Recipe:
        """The recipe without these inputs. Raises UsageError for a name that it does not have."""
        known = [part.name for part in self.parts]
        unknown = [f"the recipe has no input {name!r}{guess(name, known)}" for name in names if name not in known]
        if unknown:
            raise UsageError(unknown, f"it has {', '.join(known)}")
        return replace(self, parts=tuple(part for part in self.parts if part.name not in names))


def names_for(references: list[str]) -> list[str]:
    """A short name for each reference: that of its file or folder, with a number if it is already taken."""
    names: list[str] = []
    for reference in references:
        stem = Path(reference.partition("@")[0].rstrip("/")).name.removesuffix(".safetensors") or reference
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def statistics_files(recipe: Recipe, part: Part) -> dict[str, Path]:
    """The files of statistics that an input has for the recipe's method, by the statistic's name, such as `fisher`."""
    wanted = [statistic.name for statistic in methods.find(recipe.method).statistics]
    return {name: Path(os.path.expanduser(str(part.options[name]))) for name in wanted if name in part.options}
