"""Documents in mergekit's form, and the parameter values that mergekit 0.1.5 resolves for each tensor.

    PEER/bin/python tests/merges/recipes/mergekit_grid.py            records them anew (PEER: mergekit_peer.py)
    PEER/bin/python tests/merges/recipes/mergekit_grid.py FILE SEED  answers others, for test_against_mergekit.py

A document draws a method, a layout (models, slices, or one module with either) and, for each parameter at each level,
nothing or one of the forms that YAML can give it. `mergekit_grid.json` holds a document and mergekit's answer per line:
for each parameter the values at TENSORS, or the one that all have; or the error.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("mergekit_grid.json")
COUNT = 510
LAYERS = 3
TENSORS = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(LAYERS)
        for part in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj")
    ),
    "model.norm.weight",
    "lm_head.weight",
)
DELTAS = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask")
METHODS: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "task_arithmetic": DELTAS,
    "ties": DELTAS,
    "dare_linear": DELTAS,
    "dare_ties": DELTAS,
    "della": (*DELTAS, "epsilon"),
    "della_linear": (*DELTAS, "epsilon"),
    "breadcrumbs": (*DELTAS, "gamma"),
    "breadcrumbs_ties": (*DELTAS, "gamma"),
    "slerp": ("t",),
    "nearswap": ("t",),
    "nuslerp": ("weight",),
    "multislerp": ("weight", "normalize_weights"),
    "karcher": ("max_iter", "tol"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk", "int8_mask"),
    "passthrough": ("scale",),
}
RANGES = {
    "weight": (0.1, 1.5), "density": (0.3, 0.7), "lambda": (0.2, 1.2), "epsilon": (0.02, 0.25), "gamma": (0.01, 0.1),
    "t": (0.0, 1.0), "tol": (1e-9, 1e-4), "select_topk": (0.1, 1.0), "scale": (0.2, 2.0),
}  # fmt: skip
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 20}
EACH = ("weight", "density", "epsilon", "gamma", "scale")
SWITCHES = (True, False, 1, 0, 1.0, 0.0, "true", "False", "yes", "off")
FILTERS = ("mlp", "self_attn", "layers.1", "layers.2.mlp", "norm", "embed", "lm_head", "*.mlp.*", "Mlp", "*", "")


def documents(count: int = COUNT, seed: int = 0) -> list[dict[str, Any]]:
    """The documents, drawn from a seed."""
    draw = random.Random(seed)
    return [_document(draw, list(METHODS)[number % len(METHODS)]) for number in range(count)]


def _document(draw: random.Random, method: str) -> dict[str, Any]:
    names = ["a"] if method == "passthrough" else ["a", "b"]
    base = {"slerp": "a", "nearswap": "a", "linear": None, "karcher": None, "passthrough": None}.get(method, "base")
    if method in ("linear", "karcher") and draw.random() < 0.3:
        base = draw.choice(["a", "base"])
    if method in ("nuslerp", "multislerp") and draw.random() < 0.5:
        base = None
    words = [name for name in METHODS[method] if name == "weight" or draw.random() < 0.4] or [METHODS[method][0]]
    content: dict[str, Any] = {}
    if draw.random() < 0.4:
        ranges = draw.choice([[[0, LAYERS]], [[0, 2], [2, LAYERS]], [[0, 1], [1, LAYERS]], [[1, LAYERS], [0, 1]]])
        inside = [*names, base] if base and base not in names else names
        content["slices"] = []
        for layers in ranges:
            sources = [_with(draw, words, {"model": name, "layer_range": layers}, 0.4) for name in inside]
            content["slices"].append(_with(draw, words, {"sources": sources}, 0.3))
    else:
        listed = [*names, base] if base and base not in names and draw.random() < 0.4 else names
        content["models"] = [_with(draw, words, {"model": name}, 0.4) for name in listed]
    if draw.random() < 0.2:
        content = {"modules": {"default": _with(draw, words, content, 0.4)}}
    document = {"merge_method": method} | ({"base_model": base} if base else {}) | content
    return _with(draw, words, document, 0.9)


def _with(draw: random.Random, words: list[str], entry: dict[str, Any], chance: float) -> dict[str, Any]:
    """The entry with parameters, each with this chance; what applies to all inputs is rarer under one of them."""
    one = "model" in entry
    given = {
        name: _setting(draw, name)
        for name in words
        if draw.random() < chance * (0.3 if one and name not in EACH else 1)
    }
    return entry | ({"parameters": given} if given else {})


def _setting(draw: random.Random, name: str) -> Any:
    """A scalar, a gradient, or filters with or without a last entry that has none."""
    form = draw.random()
    if form < 0.3:
        return _scalar(draw, name)
    if form < 0.5:
        return _gradient(draw, name)
    if form < 0.53:
        return []

    def value() -> Any:
        return _scalar(draw, name) if draw.random() < 0.7 else _gradient(draw, name)

    entries = [{"filter": draw.choice(FILTERS), "value": value()} for _ in range(draw.randint(1, 3))]
    if len(entries) == 1 and draw.random() < 0.3:
        return entries[0]
    if draw.random() < 0.4:
        entries.append({"value": value()} if draw.random() < 0.7 else {"filter": None, "value": value()})
    return entries


def _gradient(draw: random.Random, name: str) -> list[Any]:
    return [_scalar(draw, name) for _ in range(draw.randint(1, 4))]


def _scalar(draw: random.Random, name: str) -> Any:
    if name == "max_iter":
        return draw.choice([5, 10, 20.0, "30", "5.0"])
    if name not in RANGES:
        return draw.choice(SWITCHES)
    low, high = RANGES[name]
    number = round(low + draw.random() * (high - low), 3) if high > 0.001 else low
    return draw.choice([number, number, number, str(number), f"{number:.3e}", *([True, 1] if name == "weight" else [])])


def placed(value: Any, folder: Path) -> Any:
    """The document with the models' names replaced by their folders."""
    if isinstance(value, dict):
        return {
            key: str(folder / inner) if key in ("model", "base_model") and isinstance(inner, str) else
            placed(inner, folder) for key, inner in value.items()
        }  # fmt: skip
    return [placed(inner, folder) for inner in value] if isinstance(value, list) else value


def answers(grid: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What mergekit resolves for each document, without merging: `folder` holds the models."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    import mergekit_peer  # noqa: F401  the repair of its models
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    options = MergeOptions()
    LoaderCache().setup(options=options)
    found = []
    for document in grid:
        try:
            config = MergeConfiguration.model_validate(placed(document, folder))
            architecture = get_architecture_info(config, options)
            planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
            planner._plan()
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split()).replace(str(folder) + "/", "")
            found.append({"error": text[:160]})
            continue
        values: dict[str, list[Any]] = {}
        for weight, task in planner._tensors:
            if weight.name not in TENSORS:
                continue
            at = TENSORS.index(weight.name)
            named = dict(task.parameters.items())
            for model, given in task.input_parameters.items():
                named |= {f"{name} {Path(model.model.path).name}": value for name, value in given.items()}
            for name, value in named.items():
                values.setdefault(name, [None] * len(TENSORS))[at] = (
                    round(value, 9) if isinstance(value, float) else value
                )
        found.append({name: row[0] if len(set(row)) == 1 else row for name, row in values.items()})
    return found


def main() -> None:
    """Record mergekit's answers, and its methods' parameters with their defaults."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import folders

    with tempfile.TemporaryDirectory() as name:
        for model in ("base", "a", "b"):
            folders.write(Path(name) / model, folders.weights(0), config=HEADS)
        grid = documents(seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
        rows = answers(grid, Path(name))
    from mergekit.merge_methods.registry import registered_methods

    specs = {
        method.spec.name: {
            p.name: {"scope": p.scope.value, "default": "required" if p.required else p.default}
            for p in method.spec.parameters
        }
        for method in registered_methods()
    }
    lines = [json.dumps({"document": d, "answer": a}, separators=(",", ":")) for d, a in zip(grid, rows, strict=True)]
    recorded = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED
    recorded.write_text(
        '{"version":"0.1.5",\n"methods":' + json.dumps(specs) + ',\n"grid":[\n' + ",\n".join(lines) + "\n]}\n"
    )
    wrong = sum("error" in row for row in rows)
    print(f"{len(rows)} documents, {wrong} of them refused; {recorded.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
