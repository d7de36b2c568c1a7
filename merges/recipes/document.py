"""Reading a recipe from a document: our YAML, mergekit's YAML, or the record of a finished merge.

Unknown keys are errors. mergekit's files, which have the key `merge_method`, are translated by
merges/recipes/mergekit. Numbers are read by vectors/documents/numbers.py, as `--set` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merges import methods
from merges.recipes.mergekit.translation import translate
from merges.recipes.parameters import normalized
from merges.recipes.recipe import Part, Recipe, Slice, SliceSource, Tokenizer, TokenSource, names_for
from merges.recipes.validation import require_valid
from vectors.documents import numbers, yaml_text
from vectors.documents.json_text import LARGEST, read_bounded
from vectors.documents.schema import excerpt
from vectors.errors import UsageError, guess

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
    "allow_config",
    "required",
)
# Keys of our recipes and of mergekit's whose values are names, which stay text: a folder may be called 1e3.
TEXTS = (
    "model", "name", "base", "base_model", "method", "merge_method", "dtype", "out_dtype", "as", "scope", "path",
    "revision", "lora", "source", "tokenizer_source", "chat_template",
)  # fmt: skip
DOCUMENT_HINT = "see docs/merge.md for the keys of a recipe"
OTHER_TOOLS = {
    "experts": "mergekit-moe, which makes a mixture of experts of dense models",
    "gate_mode": "mergekit-moe, which makes a mixture of experts of dense models",
    "genome": "mergekit-evolve, which searches for parameters",
}
SLICE_KEYS = ("sources", "base", "parameters")
SOURCE_KEYS = ("model", "layers", "parameters")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "token", "force")
LARGEST_MULTIPLE = 65_536


def read(path: Path) -> Recipe:
    """A recipe from a file, as `draft` reads it. Raises UsageError with everything that is wrong with it."""
    recipe = draft(path)
    require_valid(recipe, str(path))
    return recipe


def draft(path: Path) -> Recipe:
    """What can be read of a recipe in a YAML file, ours or mergekit's, or of the record of a finished merge.

    What is wrong with the document is in its `problems`, so that a plan reports them together with those of the inputs
    and options. Raises UsageError for a file that is no recipe at all.
    """
    try:
        value = yaml_text.parse(read_bounded(path, LARGEST).decode("utf-8-sig"), texts=TEXTS)
    except (OSError, ValueError) as error:
        if "expected a single document" in str(error):
            raise UsageError(
                f"{path} holds several documents, as files of mergekit-multi do",
                "split it where a line is ---, and merge the files one after the other",
            ) from error
        raise UsageError(f"{path} can't be read as YAML: {' '.join(str(error).split())}", "check the file") from error
    if isinstance(value, dict) and "outputs" in value:  # the record of a merge, of this version or an earlier one
        value = value.get("config" if value.get("command") == "merge" else "recipe", value)
    return _read(value, str(path))


def parse(value: Any, where: str = "the recipe") -> Recipe:
    """A recipe from the value of a YAML or JSON document. Raises UsageError with every unknown key and bad value."""
    recipe = _read(value, where)
    if recipe.problems:
        raise UsageError(recipe.problems, DOCUMENT_HINT)
    return recipe


def _read(value: Any, where: str) -> Recipe:
    """The recipe of a document, with its problems, of which each leaves out what it is about. Raises UsageError."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a mapping", "see docs/merge.md")
    for key, tool in OTHER_TOOLS.items():
        if key in value and "merge_method" not in value and "method" not in value:
            raise UsageError(
                f"{where} is a file of {tool}; it has {key!r} and no merge_method",
                f"run {tool.partition(',')[0]} on it, and merge its result",
            )
    notes: list[str] = []
    problems: list[str] = []
    is_ours = "merge_method" not in value
    if not is_ours:
        value, notes, problems = translate(value, where)
    elif "method" not in value:
        problems.append(f"{where} has no method")
    problems += _unknown(value, KEYS, where)
    models, of_models = _models(value.get("models"), where)
    problems += of_models
    slices = value.get("slices") or []
    of_slices = _problems_of_slices(slices, where)
    problems += of_slices
    if is_ours and not models and not slices and not of_models:
        problems.append(f"{where} has no models")
    parameters = value.get("parameters") or {}
    if not _has_text_keys(parameters):
        problems.append(f"{where}: parameters is not a mapping")
        parameters = {}
    of_tokenizer = _problems_of_tokenizer(value.get("tokenizer"), where)
    problems += of_tokenizer
    texts: dict[str, str | None] = {}
    for key in ("method", "base", "scope", "dtype", "as", "chat_template"):
        given = value.get(key)
        texts[key] = given if isinstance(given, str) else None
        if given is not None and not isinstance(given, str):
            problems.append(f"{where}: {key} is {excerpt(given)}, not text")
    lists: dict[str, tuple[str, ...]] = {}
    for key in ("allow_config", "required"):
        listed = value.get(key) or []
        good = isinstance(listed, list) and all(isinstance(item, str) for item in listed)
        lists[key] = tuple(listed) if good else ()
        if not good:
            problems.append(f"{where}: {key} is {excerpt(listed)}, not a list of names")
    seed = numbers.number(value.get("seed", 0))
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(f"{where}: seed is {excerpt(value['seed'])}, not a whole number")
        seed = 0
    read = _reader(texts["method"] or "")
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
        texts["method"] or "",
        parts,
        texts["base"],
        read(parameters),
        texts["scope"] or "tensor",
        seed,
        texts["dtype"] or "auto",
        texts["as"] or "model",
        (Slice(()),) if of_slices else tuple(_slice(entry, read) for entry in slices),
        Tokenizer() if of_tokenizer else _tokenizer(value["tokenizer"]) if value.get("tokenizer") else None,
        texts["chat_template"],
        lists["allow_config"],
        lists["required"],
        tuple(notes),
        tuple(problems),
    )


def _models(value: Any, where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of `models` that can be read, and what is wrong with the others."""
    if not isinstance(value or [], list):
        return [], [f"{where}: models is not a list of entries with a model"]
    entries, problems = [], []
    for number, entry in enumerate(value or [], 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            problems.append(f"{where}: models is not a list of entries with a model: entry {number} has none")
            continue
        name = entry["model"]
        problems += [f"{where}: the key {key!r} of {name} is not text" for key in entry if not isinstance(key, str)]
        if not isinstance(entry.get("name", ""), str):
            problems.append(f"{where}: the name of {name} is {entry['name']!r}, not text")
        readable = {key: given for key, given in entry.items() if isinstance(key, str)}
        entries.append({k: v for k, v in readable.items() if k != "name" or isinstance(v, str)})
    return entries, problems


def _reader(method: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The function that reads options of this method; text such as "0.9" becomes a number where one is expected."""
    chosen = methods.available().get(method)
    options = {option.name: option for option in chosen.options} if chosen is not None else {}
    return lambda given: {k: normalized(options[k], v) if k in options else v for k, v in given.items()}


def _slice(entry: Mapping[str, Any], read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Slice:
    """A slice from its checked mapping."""

    def parameters(given: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if given.get("parameters") is None else read(given["parameters"])

    sources = tuple(
        SliceSource(source["model"], (source["layers"][0], source["layers"][1]), parameters(source))
        for source in entry["sources"]
    )
    return Slice(sources, entry.get("base"), parameters(entry))


def _tokenizer(entry: Mapping[str, Any]) -> Tokenizer:
    """The requested vocabulary, from its checked mapping."""
    tokens = {
        token: TokenSource(source["source"], source.get("token"), source.get("force"))
        for token, source in (entry.get("tokens") or {}).items()
    }
    return Tokenizer(entry.get("source") or "union", tokens, entry.get("pad_to_multiple_of"))


def _has_text_keys(value: Any) -> bool:
    """Whether a value is a mapping whose keys are text."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _unknown(value: Mapping[Any, Any], known: tuple[str, ...], where: str, inside: str = "") -> list[str]:
    strangers = [key for key in value if key not in known]
    return [f"{where}: unknown key {repr(key)[:80]}{inside}{guess(str(key)[:80], known)}" for key in strangers]


def _problems_of_tokenizer(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, dict):
        return [f"{where}: tokenizer is not a mapping with a source"]
    problems = _unknown(value, TOKENIZER_KEYS, where, " in tokenizer")
    multiple, tokens = value.get("pad_to_multiple_of", 1), value.get("tokens") or {}
    if isinstance(multiple, bool) or not isinstance(multiple, int) or not 1 <= multiple <= LARGEST_MULTIPLE:
        problems.append(
            f"{where}: pad_to_multiple_of is {excerpt(multiple)}, not a whole number from 1 to {LARGEST_MULTIPLE}"
        )
    if not _has_text_keys(tokens):
        return [*problems, f"{where}: tokens is not a mapping from tokens"]
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
                f"{where}: in the token {token!r}, `token` is not text or an id, or `force` is not true or false"
            )
    return problems


def _problems_of_slices(slices: Any, where: str) -> list[str]:
    if not isinstance(slices, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sources"), list) and entry["sources"] for entry in slices
    ):
        return [f"{where}: slices is not a list of entries with sources"]
    problems = []
    for number, entry in enumerate(slices, 1):
        problems += _unknown(entry, SLICE_KEYS, where, f" in slice {number}")
        for source in entry["sources"]:
            if not isinstance(source, dict):
                problems.append(f"{where}: a source of slice {number} is {excerpt(source)}, not a mapping")
                continue
            problems += _unknown(source, SOURCE_KEYS, where, f" in a source of slice {number}")
            layers = source.get("layers")
            good = isinstance(layers, list) and len(layers) == 2 and all(isinstance(i, int) for i in layers)
            if not isinstance(source.get("model"), str):
                problems.append(f"{where}: a source of slice {number} has no model")
            if not good or not isinstance(layers, list) or not 0 <= layers[0] < layers[1]:
                problems.append(
                    f"{where}: a source of slice {number} has layers {excerpt(layers)}, not [first, last + 1]"
                )
        if not isinstance(entry.get("base", ""), str):
            problems.append(f"{where}: base of slice {number} is {excerpt(entry['base'])}, not a model")
        for given in [entry, *(source for source in entry["sources"] if isinstance(source, dict))]:
            if not _has_text_keys(given.get("parameters") or {}):
                problems.append(f"{where}: parameters of slice {number} is not a mapping")
        named = [str(source.get("model")) for source in entry["sources"] if isinstance(source, dict)]
        problems += [
            f"{where}: slice {number} names {name} twice" for name in sorted({n for n in named if named.count(n) > 1})
        ]
    return problems
