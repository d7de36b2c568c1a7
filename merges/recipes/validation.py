"""Checks of a recipe without its files: unknown options, values out of range, the number of inputs."""

from __future__ import annotations

from merges import methods
from merges.recipes.chat_templates import NAMED
from merges.recipes.parameters import problems_of_value
from merges.recipes.recipe import Recipe
from vectors.errors import UsageError, guess
from vectors.registry.options import Option

DTYPES = ("auto", "float32", "bfloat16", "float16")
SCOPES = ("tensor", "global")


def problems_of_recipe(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe and the document it came from, before any of its inputs is opened."""
    known = methods.available()
    problems = [*recipe.problems, *_problems_of_words(recipe)]
    if recipe.method not in known:
        if recipe.method or not recipe.problems:  # a document's problems say why it has none
            problems.append(f"there is no merge method {recipe.method!r}{guess(recipe.method, known)}")
        return problems
    method = known[recipe.method]
    options: dict[str, Option] = {option.name: option for option in method.options}
    extras = [statistic.name for statistic in method.statistics]
    for where, given, of_one_input in [
        ("parameters", recipe.options, False),
        *((f"the input {part.name}", part.options, True) for part in recipe.parts),
    ]:
        for key, value in given.items():
            if key in extras and of_one_input:
                if not isinstance(value, str):
                    problems.append(f"{where}: {key} is {value!r}, not the name of a file")
            elif key not in options:
                problems.append(f"{where}: {recipe.method} has no option {key!r}{guess(key, [*options, *extras])}")
            elif of_one_input and not options[key].each:
                problems.append(f"{where}: {key} applies to all inputs; set it under parameters")
            else:
                problems += problems_of_value(options[key], value, where)
    for number, entry in enumerate(recipe.slices, 1):
        of_slice = (f"slice {number}", entry.parameters, False)
        of_sources = ((f"{source.model} in slice {number}", source.parameters, True) for source in entry.sources)
        for where, given_, of_one_input in (of_slice, *of_sources):
            for key, value in (given_ or {}).items():
                if key not in options:
                    problems.append(f"{where}: {recipe.method} has no option {key!r}{guess(key, options)}")
                elif of_one_input and not options[key].each:
                    problems.append(f"{where}: {key} applies to all inputs; set it under the slice's parameters")
                else:
                    problems += problems_of_value(options[key], value, where)
    problems += [
        f"required: {recipe.method} has no option {key!r}{guess(str(key), options)}"
        for key in recipe.required
        if key not in options
    ]
    for part in recipe.parts:
        problems += [
            f"the input {part.name} needs {name}, the path of a file of statistics"
            for name in extras
            if name not in part.options
        ]
    least, most = method.inputs
    count = len(recipe.parts)
    if not recipe.slices and (count < least or (most is not None and count > most)):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        problems.append(f"{recipe.method} takes {wanted} inputs; there {'is' if count == 1 else 'are'} {count}")
    if method.base == "unused" and recipe.base and recipe.as_ != "vector" and method.space == "delta":
        problems.append(f"{recipe.method} uses no base")
    if recipe.as_ == "vector" and (recipe.slices or recipe.tokenizer is not None):
        what = "slices" if recipe.slices else "another vocabulary"
        problems.append(f"as: vector is not possible with {what}: the result does not fit the base")
    if recipe.scope == "global" and not method.global_scope:
        problems.append(f"{recipe.method} does not support scope: global")
    if "weight" in options and recipe.parts:
        weights = [
            part.options.get("weight", recipe.options.get("weight", options["weight"].default)) for part in recipe.parts
        ]
        if all(not isinstance(weight, list) and weight == 0 for weight in weights):
            problems.append("all weights are zero")
        elif method.divides_by_weights(recipe.options) and not any(
            isinstance(value, list) for value in (*weights, *recipe.options.values())
        ):
            try:
                if abs(sum(weights)) < 1e-12:
                    problems.append(f"the weights sum to zero, and {recipe.method} divides by their sum")
            except TypeError:
                pass  # already reported as not a number
    return problems


def _problems_of_words(recipe: Recipe) -> list[str]:
    """What is wrong with the names of the inputs, and with words that do not depend on the method."""
    problems: list[str] = []
    names = [part.name for part in recipe.parts]
    for reference in (*(part.model for part in recipe.parts), *names, recipe.base or ""):
        try:
            reference.encode()
        except UnicodeEncodeError:
            problems.append(f"the name {reference!r} is not valid Unicode")
    problems += [f"two inputs are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
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
        problems.append(
            f"chat_template is {template!r}, not {', '.join(words)} or a Jinja template{guess(template, words)}"
        )
    return problems


def require_valid(recipe: Recipe, where: str = "") -> None:
    """Raise UsageError with everything that is wrong with a recipe; `where` is the file it was read from."""
    problems = problems_of_recipe(recipe)
    if problems:
        before = f"{where}: " if where else ""
        raise UsageError(
            [problem if problem in recipe.problems else before + problem for problem in problems],
            ("see docs/merge.md for the keys of a recipe" if recipe.problems else "see `steer merge --methods`"),
        )
