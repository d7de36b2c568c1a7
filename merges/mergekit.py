"""mergekit's YAML, read as it stands; what differs here is set so that the result is the one mergekit means.

Unknown keys are errors here. mergekit elects signs after weighting, gives a cancelled vote to +, rescales DARE to the
length of the delta, divides by the sum of the weights where `normalize` says so, and reads `filter` as part of a name.
"""

from __future__ import annotations

from typing import Any

from merges.options import guess
from vectors.errors import UsageError

KEYS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name",
)  # fmt: skip
# Of mergekit's parameters, by method: our word for each, or None where it has no effect on the result.
COMMON: dict[str, str | None] = {
    "weight": "weight",
    "density": "density",
    "lambda": "lambda",
    "normalize": "normalize",
    "int8_mask": None,
}
OWN: dict[str, dict[str, str | None]] = {
    "slerp": {"t": "t"},
    "nuslerp": {"nuslerp_row_wise": "row_wise", "nuslerp_flatten": None},
    "multislerp": {"normalize_weights": None, "eps": None},
    "karcher": {"max_iter": "max_iter", "tol": "tol"},
    "della": {"epsilon": "epsilon", "rescale": "rescale"},
    "della_linear": {"epsilon": "epsilon", "rescale": "rescale"},
    "dare_linear": {"rescale": "rescale"},
    "dare_ties": {"rescale": "rescale"},
    "ties": {"rescale": None},
    "breadcrumbs": {"gamma": "gamma", "rescale": None},
    "breadcrumbs_ties": {"gamma": "gamma", "rescale": None},
    "model_stock": {"filter_wise": "filter_wise"},
    "sce": {"select_topk": "select_topk"},
    "nearswap": {"t": "t"},
    "passthrough": {"scale": "scale"},
}
ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
NORMALIZED = {"ties": True, "della": True, "dare_ties": False, "breadcrumbs_ties": False, "linear": True}
DENSITY = {
    "ties": 1.0,
    "dare_ties": 1.0,
    "dare_linear": 1.0,
    "della": 1.0,
    "della_linear": 1.0,
    "breadcrumbs": 1.0,
    "breadcrumbs_ties": 1.0,
}
RESCALED = ("dare_linear", "dare_ties", "della", "della_linear")


def parse(value: dict[str, Any], where: str) -> Any:
    """A recipe from a mergekit configuration. Raises UsageError with every problem."""
    from merges import methods
    from merges.recipe import Part, Recipe, names_for

    problems = [f"{where}: unknown key {key!r}{guess(str(key), KEYS)}" for key in value if key not in KEYS]
    method = str(value["merge_method"])
    known = methods.available()
    if method not in known:
        problems.append(f"{where}: there is no merge method {method!r}{guess(method, known)}")
        raise UsageError(problems, f"available: {', '.join(known)}")
    options = [option.name for option in known[method].OPTIONS]
    each = {option.name for option in known[method].OPTIONS if option.each}

    def translated(parameters: Any, place: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not isinstance(parameters or {}, dict):
            problems.append(f"{place}: parameters is no mapping")
            return found
        words = COMMON | OWN.get(method, {})
        for key, given in (parameters or {}).items():
            if key not in words:
                problems.append(f"{place}: {method} has no parameter {key!r}{guess(str(key), words)}")
            elif words[key] == "normalize" and method in ELECTING:
                found["combine"] = "mean" if given else "sum"
            elif words[key] == "rescale":
                found["rescale"] = "l1" if given else "none"
            elif words[key] is not None and words[key] in options:
                found[str(words[key])] = given
            elif words[key] is not None and key not in ("normalize", "density", "weight", "lambda"):
                problems.append(f"{place}: {method} has no parameter {key!r}")
        return found

    shared = translated(value.get("parameters"), where)
    base = value.get("base_model")
    entries = list(value.get("models") or [])
    slices = []
    for number, entry in enumerate(value.get("slices") or [], 1):
        sources = []
        for source in entry.get("sources") or []:
            unknown = sorted(set(source) - {"model", "layer_range", "parameters"})
            problems += [f"{where}: unknown key {key!r} in a source of slice {number}" for key in unknown]
            sources.append(
                {"model": source.get("model"), "layers": source.get("layer_range"),
                 "parameters": translated(source.get("parameters"), f"{where}: slice {number}")}
            )  # fmt: skip
            if source.get("model") not in [known_entry.get("model") for known_entry in entries]:
                entries.append({"model": source.get("model")})
        slices.append(
            {"sources": sources, "parameters": translated(entry.get("parameters"), f"{where}: slice {number}")}
        )
    parts = []
    for entry in entries:
        unknown = sorted(set(entry) - {"model", "parameters"})
        problems += [f"{where}: unknown key {key!r} in the model {entry.get('model')}" for key in unknown]
        if not isinstance(entry.get("model"), str):
            problems.append(f"{where}: an entry of models names no model")
            continue
        own = translated(entry.get("parameters"), f"{where}: {entry['model']}")
        needs_two = method in ("slerp", "nearswap", "arcee_fusion", "linear", "passthrough", "karcher")
        if entry["model"] == base and not needs_two and not slices:
            continue  # mergekit lists the base among the models; its delta is nothing
        parts.append((entry["model"], {k: v for k, v in own.items() if k in each}))
        shared |= {k: v for k, v in own.items() if k not in each}
    if base and method in ("slerp", "nearswap", "arcee_fusion") and not slices:
        # In these the base is one of the two, and the first.
        parts = [(base, {}), *[entry for entry in parts if entry[0] != base]]
        base = None
    if method in ELECTING:
        shared = {"elect": "after", "zero": "positive", "combine": "mean" if NORMALIZED[method] else "sum"} | shared
    if method == "linear":
        shared = {"normalize": True} | shared
    if method in RESCALED:
        shared = {"rescale": "l1"} | shared
    if method in DENSITY and "density" not in shared:
        shared["density"] = DENSITY[method]
    dtype = value.get("out_dtype") or value.get("dtype") or "auto"
    tokenizer = value.get("tokenizer")
    source = value.get("tokenizer_source") or (tokenizer or {}).get("source")
    wanted = None
    if source and source != "base":
        wanted = {"source": source.get("model") if isinstance(source, dict) else source}
        tokens = {token: _token(entry) for token, entry in ((tokenizer or {}).get("tokens") or {}).items()}
        wanted |= {"tokens": tokens} if tokens else {}
    if value.get("chat_template") not in (None, "auto"):
        problems.append(f"{where}: chat_template is always that of the base here; leave the key out, or say auto")
    if not parts:
        problems.append(f"{where} has no models")
    if problems:
        raise UsageError(problems, "mergekit would ignore such keys; correct them or take them out")
    names = names_for([reference for reference, _ in parts])
    return Recipe(
        method,
        tuple(Part(reference, name, own) for (reference, own), name in zip(parts, names, strict=True)),
        base,
        shared,
        dtype=str(dtype),
        slices=tuple(slices),
        tokenizer=wanted,
    )


def _token(entry: Any) -> dict[str, Any]:
    source = entry.get("source") if isinstance(entry, dict) else entry
    if isinstance(source, dict):
        return {"source": "zero" if source.get("kind") == "zero" else source.get("model")}
    return {"source": source}
