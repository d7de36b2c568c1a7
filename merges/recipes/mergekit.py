"""Translation of mergekit's YAML into our recipes, with options that reproduce mergekit's results.

Unknown keys are errors here. Unlike our defaults, mergekit elects signs after weighting, elects + where votes cancel,
rescales DARE to the L1 norm of the delta, divides by the sum of the weights only with `normalize`, matches `filter`
anywhere in a name, and uses a token's given source only for models that lack the token, unless it is forced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from merges import methods
from merges.recipes.recipe import names_for
from vectors.errors import UsageError, guess

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip
MODULE_KEYS = ("models", "slices", "parameters")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")


class Word(NamedTuple):
    """One of mergekit's parameters: our option for it (None: ignored), and our value for each of its, if different."""

    option: str | None
    values: Mapping[Any, Any] = {}


SAME = {name: Word(name) for name in ("weight", "density", "lambda", "gamma", "epsilon", "t", "scale", "filter_wise",
                                      "max_iter", "tol", "select_topk", "normalize")}  # fmt: skip
MASK = {"int8_mask": Word(None)}  # affects memory use, not the result
LENGTH = {"rescale": Word("rescale", {True: "l1", False: "none"})}
MEAN = {"normalize": Word("combine", {True: "mean", False: "sum"})}


def _words(*names: str, **more: Word) -> dict[str, Word]:
    return {name: SAME[name] for name in names} | more


DELTAS = _words("weight", "lambda", "density") | MASK
METHODS: dict[str, dict[str, Word]] = {
    "linear": _words("weight", "normalize"),
    "task_arithmetic": _words("weight", "lambda", "normalize") | MASK | {"density": Word(None), "rescale": Word(None)},
    "ties": DELTAS | LENGTH | MEAN,
    "dare_linear": DELTAS | LENGTH | _words("normalize"),
    "dare_ties": DELTAS | LENGTH | MEAN,
    "della": DELTAS | LENGTH | MEAN | _words("epsilon"),
    "della_linear": DELTAS | LENGTH | _words("epsilon", "normalize"),
    "breadcrumbs": DELTAS | LENGTH | _words("gamma", "normalize"),
    "breadcrumbs_ties": DELTAS | LENGTH | MEAN | _words("gamma"),
    "slerp": _words("t"),
    "nuslerp": _words("weight", nuslerp_row_wise=Word(None), nuslerp_flatten=Word(None)),
    "multislerp": _words("weight", normalize_weights=Word("normalize"), eps=Word(None)),
    "karcher": _words("max_iter", "tol"),
    "model_stock": _words("filter_wise"),
    "sce": _words("select_topk") | MASK,
    "nearswap": _words("t"),
    "arcee_fusion": {},
    "passthrough": _words("scale"),
}
ELECTION = {"elect": "after", "zero": "positive"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "ties": ELECTION | {"combine": "mean", "density": 1.0},
    "dare_linear": {"rescale": "l1", "density": 1.0},
    "dare_ties": ELECTION | {"combine": "sum", "rescale": "l1", "density": 1.0},
    "della": ELECTION | {"combine": "mean", "rescale": "l1", "density": 1.0},
    "della_linear": {"rescale": "l1", "density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": ELECTION | {"combine": "sum", "density": 1.0},
}
PAIRS = ("slerp", "nearswap", "arcee_fusion")  # methods whose base is the first of the two inputs
WHOLE = (*PAIRS, "linear", "passthrough", "karcher")  # methods that merge a listed base as an input


class _Reading:
    """The reading of one file; a class because problems are collected across its methods."""

    def __init__(self, method: str, where: str) -> None:
        self.method, self.where = method, where
        self.problems: list[str] = []

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
        good = isinstance(value, dict) and isinstance(value.get("path"), str)
        revision = value.get("revision") if good else None
        if not good or not isinstance(revision, str | None):
            self.problems.append(f"{self.where}: {what} has {value!r} instead of a path")
            return ""
        self.unknown(value, ("path", "revision"), f" in {what}")
        return value["path"] + (f"@{revision}" if revision else "")

    def parameters(self, value: Any, place: str) -> dict[str, Any]:
        """Our options for a mapping of mergekit's parameters; `place` names where it stands, in messages."""
        words = METHODS[self.method]
        options: dict[str, Any] = {}
        given = self.mapping(value, f"parameters of {place}" if place else "parameters")
        for key, setting in given.items():
            word = words.get(key)
            if word is None:
                at = f"{self.where}: {place}: " if place else f"{self.where}: "
                self.problems.append(f"{at}{self.method} has no parameter {key!r}{guess(str(key), words)}")
            elif word.values and (not isinstance(setting, int) or setting not in word.values):
                self.problems.append(f"{self.where}: {key} is {setting!r}, not true or false")
            elif word.option is not None:
                options[word.option] = word.values[setting] if word.values else setting
        if self.method == "nuslerp" and given.get("nuslerp_flatten") is False:
            # mergekit's "row-wise" refers to the transposed matrix.
            options["along"] = "columns" if given.get("nuslerp_row_wise") else "rows"
        return options


def translate(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our document for a mergekit configuration, which is not modified. Raises UsageError with every problem."""
    method = value["merge_method"]
    known = methods.available()
    if not isinstance(method, str) or method not in METHODS or method not in known:
        raise UsageError(
            f"{where}: unknown mergekit method {method!r}{guess(str(method), METHODS)}",
            f"available: {', '.join(sorted(METHODS))}",
        )
    reading = _Reading(method, where)
    reading.unknown(value, KEYS)
    value = _without_modules(value, reading)
    each = {option.name for option in known[method].options if option.each}
    shared = reading.parameters(value.get("parameters"), "")
    base = reading.reference(value["base_model"], "base_model") if value.get("base_model") is not None else None
    parts: dict[str, dict[str, Any]] = {}
    for entry in reading.entries(value.get("models"), "models"):
        reading.unknown(entry, ("model", "parameters"), f" in the model {entry.get('model')}")
        reference = reading.reference(entry.get("model"), "an entry of models")
        options = reading.parameters(entry.get("parameters"), reference)
        if reference == base and method not in WHOLE:
            continue  # mergekit may list the base among the models; its delta is zero
        parts[reference] = {key: given for key, given in options.items() if key in each}
        shared |= {key: given for key, given in options.items() if key not in each}
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
            options = reading.parameters(source.get("parameters"), f"slice {number}")
            sources.append({"model": reference, "layers": source.get("layer_range"), "parameters": options})
            if reference != under or method in WHOLE:
                parts.setdefault(reference, {})
        if method in PAIRS:
            if under not in [source["model"] for source in sources]:
                reading.problems.append(f"{where}: the base {under} of slice {number} is not among its sources")
            sources.sort(key=lambda source: source["model"] != under)
        elif under and under != base and method not in WHOLE:
            parts.setdefault(under, {})
        translated = {"sources": sources, "parameters": reading.parameters(entry.get("parameters"), f"slice {number}")}
        slices.append(translated | ({"base": under} if slice_base is not None and method not in WHOLE else {}))
    if base and method in PAIRS:
        if not slices:
            parts = {base: {}} | parts
        base = None
    template = value.get("chat_template")
    tokenizer = _tokenizer(value, reading)
    if not parts:
        reading.problems.append(f"{where} has no models")
    if reading.problems:
        raise UsageError(reading.problems, "correct or remove these keys; mergekit itself ignores unknown ones")
    names = names_for(list(parts))
    recipe = {
        "method": method,
        "models": [
            {"model": model, "name": name} | options
            for (model, options), name in zip(parts.items(), names, strict=True)
        ],
        "parameters": DEFAULTS.get(method, {}) | shared,
        "dtype": str(value.get("out_dtype") or value.get("dtype") or "auto"),
    }
    optional = {"base": base, "slices": slices, "tokenizer": tokenizer, "chat_template": template}
    return recipe | {key: given for key, given in optional.items() if given}


def _without_modules(value: Mapping[str, Any], reading: _Reading) -> Mapping[str, Any]:
    """The configuration with the contents of its only module moved to the top level."""
    modules = reading.mapping(value.get("modules"), "modules")
    if not modules:
        return value
    if len(modules) > 1 or value.get("models") or value.get("slices"):
        beside = [key for key in ("models", "slices") if value.get(key)]
        reading.problems.append(
            f"{reading.where}: modules are {', '.join(map(str, modules))}{' beside '.join(['', *beside])}; only one "
            "module is supported: use filters on tensor names for what differs"
        )
    module = reading.mapping(next(iter(modules.values())), "a module")
    reading.unknown(module, MODULE_KEYS, f" in the module {next(iter(modules))}")
    file_parameters, module_parameters = (
        reading.mapping(entry.get("parameters"), "parameters") for entry in (value, module)
    )
    inside = {key: module[key] for key in ("models", "slices") if key in module and not value.get(key)}
    return {**value, **inside, "parameters": file_parameters | module_parameters}


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
