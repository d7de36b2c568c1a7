"""Whether the inputs of a recipe belong together: their bases, architectures, settings and tokenizers, by headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from merges.engine.method import MergeMethod
from merges.inputs.alignment import align
from merges.inputs.sources import Source
from merges.recipes.agreement import settings, tokenizers
from merges.recipes.recipe import Recipe, Tokenizer
from vectors.errors import ModelError, SteerError


@dataclass(frozen=True)
class Comparison:
    """What a comparison of the inputs gave."""

    error: SteerError | None  # with every problem
    notes: list[str]
    base: Source | None  # that deltas are taken against; None where the method takes none
    main: Source | None  # the model whose configuration and tokenizer the result takes
    comparable: bool  # whether the inputs are of one family, so that their tensors can be compared


def compare(
    recipe: Recipe, method: MergeMethod | None, sources: Sequence[Source], base: Source | None, *, complete: bool = True
) -> Comparison:
    """Compare the opened inputs of a recipe with each other and with the base; `method` is None for an unknown one.

    `complete` is whether all inputs could be opened: of others, one may have recorded the base.
    """
    problems: list[str] = []
    notes: list[str] = []
    of_method = method.base if method is not None else "optional"
    needs_base = of_method == "needed" or recipe.as_ == "vector" or any(s.is_delta for s in sources)
    only_deltas = all(s.is_delta for s in sources)
    if needs_base and base is None and complete and not recipe.base and not (only_deltas and recipe.as_ == "vector"):
        problems.append(f"{recipe.method} needs a base model to take deltas against, and none is given")
    if base is not None and base.kind != "model":
        problems.append(f"the base {base.reference} is a {base.kind}, not a model")
    unfit = bool(problems)
    models = [s for s in sources if s.kind == "model"]
    main = base or (models[0] if models else None)
    if main is not None and main.kind == "model":
        notes += align([*sources, *([base] if base is not None else [])], main)
    families = _families(main, sources, base)
    token_problems: list[str] = []
    problems += families
    if main is not None and main.kind == "model" and not families:
        others = [s for s in (*models, *([base] if base is not None else [])) if s.path != main.path]
        allowed = [key for key in recipe.allow_config if key != tokenizers.ALLOWED]
        agreed = settings.compare(main, others, allowed, stacked=bool(recipe.slices))
        problems += agreed.problems
        notes += agreed.notes
        matched = recipe.tokenizer is not None
        tokens = tokenizers.compare(main, others, recipe.allow_config, matched=matched, models=bool(models))
        token_problems = tokens.problems
        problems += tokens.problems
        notes += tokens.notes
    error = None
    if problems:
        unknown = main is None or (needs_base and base is None)
        hint = "name the model that they were fine-tuned from: --base MODEL" if unknown else ""
        if token_problems:
            hint = "--tokenizer base matches rows by token (or union: with the tokens of all)"
        if not unknown and len(problems) > len(token_problems) and not families and not unfit and main is not None:
            hint = "; ".join(text for text in (hint, settings.hint(main.reference)) if text)
        error = ModelError(problems, hint)
    uses_base = base if needs_base or of_method == "optional" else None
    comparable = main is not None and not families and not unfit and (base is not None or not needs_base)
    return Comparison(error, notes, uses_base, main, comparable)


def stand_in(
    recipe: Recipe, method: MergeMethod | None, opened: Sequence[Source | None], base: Source | None
) -> tuple[Recipe, list[Source]] | None:
    """The inputs that could be opened, merged by a method without options.

    With it the tensors of the inputs are compared though the recipe itself is refused. None where they can't be: of
    slices, some inputs are missing, or its `method` takes one input.
    """
    pairs = [(part, source) for part, source in zip(recipe.parts, opened, strict=True) if source is not None]
    partial = len(pairs) < len(recipe.parts) or (bool(recipe.base) and base is None)
    unread = any(not entry.sources for entry in recipe.slices)
    # The layers of one input each need not be those of any base, with which the other method would compare them.
    stacked = bool(recipe.slices) and method is not None and method.inputs == (1, 1)
    if not pairs or unread or stacked or (partial and recipe.slices):
        return None
    # Of some of the inputs the vocabulary is that of all these: what was requested may name one that is missing.
    tokenizer = Tokenizer() if partial and recipe.tokenizer is not None else recipe.tokenizer
    plain = replace(
        recipe, method="linear" if base is None else "task_arithmetic",
        parts=tuple(replace(part, options={}) for part, _ in pairs), options={}, scope="tensor", dtype="auto",
        tokenizer=tokenizer,
        as_="vector" if recipe.as_ == "vector" else "model", required=(),
        slices=tuple(
            replace(entry, parameters=None, sources=tuple(replace(source, parameters=None) for source in entry.sources))
            for entry in recipe.slices
        ),
    )  # fmt: skip
    return plain, [source for _, source in pairs]


def _families(main: Source | None, sources: Sequence[Source], base: Source | None) -> list[str]:
    """What is wrong with the models that inputs belong to: other architectures, or vectors of another base."""
    problems = []
    for source in sources:
        if source.kind == "model" and main is not None and source is not main:
            theirs, ours = (s.config.get("architectures") or [s.config.get("model_type")] for s in (source, main))
            if theirs != ours:
                problems.append(f"{source.reference} is a {theirs[0]}, {main.reference} a {ours[0]}")
        if source.vector is not None:
            wanted = source.vector.base["digest"]
            if base is not None and wanted != base.identity:
                known = source.vector.base.get("name", wanted)
                problems.append(
                    f"{source.reference} belongs to the base {known}, not to {base.reference} ({base.identity})"
                )
            others = {s.vector.base["digest"] for s in sources if s.vector is not None}
            if base is None and len(others) > 1:
                problems.append(f"{source.reference} and the other vectors belong to {len(others)} different bases")
    return problems
