"""From a mergekit configuration to our document: every key is translated, refused, or named in a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merges import methods
from merges.recipes.mergekit.words import DEFAULTS, EACH, KNOWN, METHODS, REQUIRED, read_setting
from merges.recipes.parameters import then
from merges.recipes.recipe import names_for
from vectors.errors import guess

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name", "allow_config",
)  # fmt: skip
MODULE_KEYS = ("models", "slices", "parameters")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
PAIRS = ("slerp", "nearswap", "arcee_fusion")  # methods whose base is the first of the two inputs
WHOLE = (*PAIRS, "linear", "passthrough", "karcher")  # methods that merge the base as an input


class _Reading:
    """The reading of one file; a class because problems and notes are collected across its methods."""

    def __init__(self, method: str, where: str) -> None:
        self.method, self.where = method, where
        self.problems: list[str] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def unknown(self, value: Mapping[Any, Any], known: tuple[str, ...], place: str = "") -> None:
        self.problems += [
            f"{self.where}: unknown key {key!r}{place}{guess(str(key), known)}" for key in value if key not in known
        ]

    def mapping(self, value: Any, what: str) -> dict[Any, Any]:
        """A mapping, or an empty one and a problem."""
        if value is None or isinstance(value, dict):
            return value or {}
        self.problems.append(f"{self.where}: {what} is {value!r}, not a mapping")
        return {}

    def entries(self, value: Any, what: str) -> list[dict[Any, Any]]:
        """A list of mappings, or an empty one and a problem."""
        if value is None or (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            return value or []
        self.problems.append(f"{self.where}: {what} is not a list of mappings")
        return []

    def reference(self, value: Any, what: str) -> str:
        """A model's name, which mergekit writes as text, or as a mapping of `model` and `lora`."""
        if isinstance(value, str):
            return value
        if not isinstance(value, dict) or value.get("model") is None:
            self.problems.append(f"{self.where}: {what} has no model")
            return ""
        self.unknown(value, ("model", "lora", "override_architecture"), f" in {what}")
        if value.get("override_architecture") is not None:
            self.problems.append(f"{self.where}: {what}: the architecture can't be overridden here")
        parts = [self.path(value["model"], what)]
        if value.get("lora") is not None:
            parts.append(self.path(value["lora"], what))
        return "+".join(parts)

    def path(self, value: Any, what: str) -> str:
        """A path, which mergekit writes as text, or as a mapping of `path` and `revision`."""
        if isinstance(value, str):
            return value
        has_path = isinstance(value, dict) and isinstance(value.get("path"), str)
        revision = value.get("revision") if has_path else None
        if not has_path or not isinstance(revision, str | None):
            self.problems.append(f"{self.where}: {what} has {value!r} instead of a path")
            return ""
        self.unknown(value, ("path", "revision"), f" in {what}")
        return value["path"] + (f"@{revision}" if revision else "")

    def parameters(self, value: Any, place: str, *, of_one_input: bool = False) -> dict[str, Any]:
        """Our options for a mapping of mergekit's parameters; `place` names where it stands, in messages.

        With `of_one_input` they stand under a model, where mergekit ignores those that apply to all inputs.
        """
        words = METHODS.get(self.method)
        options: dict[str, Any] = {}
        given = self.mapping(value, f"parameters of {place}" if place else "parameters")
        at = f"{self.where}: {place}: " if place else f"{self.where}: "
        if words is None:  # of a method that is not known, nothing can be checked
            return options
        for key, setting in given.items():
            word = words.get(key)
            if word is None and key in KNOWN:
                self.note(f"{self.method} has no parameter {key!r}, which has no effect")
            elif word is None:
                self.problems.append(f"{at}{self.method} has no parameter {key!r}{guess(str(key), words)}")
            else:
                try:
                    read = read_setting(str(key), word, setting, self.note)
                except ValueError as error:
                    self.problems.append(f"{at}{error}")
                    continue
                if of_one_input and key not in EACH:
                    if word.option is not None:
                        self.note(
                            f"{key} applies to all inputs together, so that of {place} has no effect, as in mergekit; "
                            "set it under the file's parameters"
                        )
                elif word.option is not None and read is not None:
                    options[key if word.option == "along" else word.option] = read
        return options


def translate(value: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Our document for a mergekit configuration, which is not modified; notes for the user; and every problem.

    What has a problem is left out of the document.
    """
    method = value["merge_method"]
    known = isinstance(method, str) and method in METHODS and method in methods.available()
    reading = _Reading(method if known else "", where)
    if not known:
        reading.problems.append(
            f"{where}: unknown mergekit method {method!r}{guess(str(method), METHODS)}; "
            f"available are {', '.join(sorted(METHODS))}"
        )
    method = reading.method
    reading.unknown(value, KEYS)
    value, above = _without_modules(value, reading)
    shared = reading.parameters(value.get("parameters"), "")
    for level in (above, DEFAULTS.get(method, {})):
        shared = level | {key: then(given, level[key]) if key in level else given for key, given in shared.items()}
    switches = dict(shared)
    shared = _along(shared, {}, reading)
    base = reading.reference(value["base_model"], "base_model") if value.get("base_model") is not None else None
    parts: list[tuple[str, dict[str, Any]]] = []
    for entry in reading.entries(value.get("models"), "models"):
        reading.unknown(entry, ("model", "parameters"), f" in the model {entry.get('model')}")
        reference = reading.reference(entry.get("model"), "an entry of models")
        options = reading.parameters(entry.get("parameters"), reference, of_one_input=True)
        if reference == base and method not in WHOLE:
            continue  # mergekit lists the base among the models; its delta is zero
        parts.append((reference, options))
    listed = [reference for reference, _ in parts]
    if parts and base and method in WHOLE and base not in listed:
        parts.append((base, {}))  # mergekit merges it even so
    slices = []
    for number, entry in enumerate(reading.entries(value.get("slices"), "slices"), 1):
        reading.unknown(entry, ("sources", "base_model", "residual_weight", "parameters"), f" in slice {number}")
        if entry.get("residual_weight") is not None:
            reading.problems.append(f"{where}: residual_weight of slice {number} has no effect in mergekit; remove it")
        slice_base = entry.get("base_model")
        under = base if slice_base is None else reading.reference(slice_base, f"base_model of slice {number}")
        base = base or under
        sources = []
        for source in reading.entries(entry.get("sources"), f"sources of slice {number}"):
            reading.unknown(source, ("model", "layer_range", "parameters"), f" in a source of slice {number}")
            reference = reading.reference(source.get("model"), f"a source of slice {number}")
            place = f"{reference} in slice {number}"
            options = reading.parameters(source.get("parameters"), place, of_one_input=True)
            sources.append({"model": reference, "layers": source.get("layer_range"), "parameters": options})
            if reference != under or method in WHOLE:
                _list(parts, reference)
        if method in PAIRS:
            if under not in [source["model"] for source in sources]:
                reading.problems.append(f"{where}: the base {under} of slice {number} is not among its sources")
            sources.sort(key=lambda source: source["model"] != under)
        elif under and under != base and method not in WHOLE:
            _list(parts, under)
        of_slice = reading.parameters(entry.get("parameters"), f"slice {number}")
        of_slice = _along(of_slice, switches, reading)
        translated = {"sources": sources, "parameters": of_slice}
        slices.append(translated | ({"base": under} if slice_base is not None and method not in WHOLE else {}))
    if base and method in PAIRS:
        if not slices:
            parts.sort(key=lambda part: part[0] != base)
        base = None
    template = value.get("chat_template")
    tokenizer = _tokenizer(value, reading)
    if not parts:
        reading.problems.append(f"{where} has no models")
    parts = [(reference, options) for reference, options in parts if reference]
    names = names_for([reference for reference, _ in parts])
    recipe = {
        "method": method or None,
        "models": [
            {"model": model, "name": name} | options for (model, options), name in zip(parts, names, strict=True)
        ],
        "parameters": shared,
        "dtype": str(value.get("out_dtype") or value.get("dtype") or "auto"),
    }
    required = [name for name in REQUIRED if known and name in METHODS[method]]
    optional = {
        "base": base, "slices": slices, "tokenizer": tokenizer, "chat_template": template, "required": required,
        "allow_config": value.get("allow_config"),
    }  # fmt: skip
    return recipe | {key: given for key, given in optional.items() if given}, reading.notes, reading.problems


def _list(parts: list[tuple[str, dict[str, Any]]], reference: str) -> None:
    """Add an input of a slice, once."""
    if reference not in [listed for listed, _ in parts]:
        parts.append((reference, {}))


def _along(given: dict[str, Any], above: dict[str, Any], reading: _Reading) -> dict[str, Any]:
    """The options with our `along` instead of nuslerp's two switches; `above` are those of the level above."""
    options = {key: setting for key, setting in given.items() if not key.startswith("nuslerp_")}
    if len(options) == len(given):
        return options
    both = {"nuslerp_flatten": True, "nuslerp_row_wise": False} | {
        key: setting for level in (above, given) for key, setting in level.items() if key.startswith("nuslerp_")
    }
    reading.problems += [
        f"{reading.where}: {key} can't differ between tensors here"
        for key, setting in both.items()
        if not isinstance(setting, bool)
    ]
    # mergekit's "row-wise" refers to the transposed matrix.
    along = "tensor" if both["nuslerp_flatten"] else "columns" if both["nuslerp_row_wise"] else "rows"
    return options if along == "tensor" and not above else options | {"along": along}


def _without_modules(value: Mapping[str, Any], reading: _Reading) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The configuration with the contents of its only module moved to the top level, and the options above those."""
    modules = reading.mapping(value.get("modules"), "modules")
    if not modules:
        return value, {}
    if len(modules) > 1 or value.get("models") or value.get("slices"):
        beside = [key for key in ("models", "slices") if value.get(key)]
        reading.problems.append(
            f"{reading.where}: modules are {', '.join(map(str, modules))}{' beside '.join(['', *beside])}; only one "
            "module is supported: use filters on tensor names for what differs"
        )
    module = reading.mapping(next(iter(modules.values())), "a module")
    reading.unknown(module, MODULE_KEYS, f" in the module {next(iter(modules))}")
    inside = {key: module[key] for key in ("models", "slices") if key in module and not value.get(key)}
    above = reading.parameters(value.get("parameters"), "")
    return {**value, **inside, "parameters": module.get("parameters")}, above


def _tokenizer(value: Mapping[str, Any], reading: _Reading) -> dict[str, Any] | None:
    """Our `tokenizer` for mergekit's `tokenizer`, or its older `tokenizer_source`."""
    given = reading.mapping(value.get("tokenizer"), "tokenizer")
    reading.unknown(given, TOKENIZER_KEYS, " in tokenizer")
    source = value.get("tokenizer_source") or given.get("source") or ("union" if given else None)
    if source is None:
        return None
    named = source in ("union", "base")
    tokenizer: dict[str, Any] = {"source": source if named else reading.reference(source, "the tokenizer's source")}
    if given.get("pad_to_multiple_of"):
        tokenizer["pad_to_multiple_of"] = given["pad_to_multiple_of"]
    tokens = {}
    for token, entry in reading.mapping(given.get("tokens"), "tokens").items():
        location = f" in the token {token!r}"
        entry = reading.mapping(entry, f"the token {token!r}")
        reading.unknown(entry, ("source", "force"), location)
        row = entry.get("source")
        chosen: dict[str, Any]
        if isinstance(row, dict) and row.get("kind") == "zero":
            reading.unknown(row, ("kind",), location)
            chosen = {"source": "zero"}
        elif isinstance(row, dict) and row.get("kind") == "model_token":
            reading.unknown(row, ("kind", "model", "token", "token_id"), location)
            chosen = {"source": reading.reference(row.get("model"), f"the token {token!r}")}
            chosen |= {"token": row["token"] if row.get("token") is not None else row.get("token_id")}
        else:
            chosen = {"source": reading.reference(row, f"the token {token!r}")}
        tokens[token] = chosen | {"force": entry.get("force", False)}
    return tokenizer | ({"tokens": tokens} if tokens else {})
