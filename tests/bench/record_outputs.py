"""The SHA-256 of everything that a fixed list of commands writes, to prove that a change of the code left all bytes.

    .venv/bin/python tests/bench/record_outputs.py BEFORE.json [--only merge,fold] [--jobs 2]
    .venv/bin/python tests/bench/record_outputs.py AFTER.json --compare BEFORE.json
    .venv/bin/python tests/bench/record_outputs.py DEMO.json --only demo

Pico models, their fine-tunes, adapters and examples are made from seeds in a temporary folder; then `python -m steer`
runs there, a process for each command, and whatever lies in the folder afterwards, inputs too, is hashed. Nothing of
steer is imported, so that one copy of this file records two versions of the code: `--steer 'PYTHON -m steer'` names the
one that runs, `--tests DIR` the tests whose `pico.py` builds the models, beside whose folder `examples` lies. Commands
run with one thread of OpenMP, offline, and with a cache of their own, so the bundled model is converted anew.

What is written, each by path relative to the temporary folder:

    files     models, adapters, vectors, configurations, tokenizers, the texts that `try`, `show` and `compare` print
    tensors   of the same safetensors files what they hold without their metadata: names, dtypes, shapes and bytes
    records   reports, model cards, pictures, and what the other commands print, whose wording may change
    failed    the exit code of each command that failed, with the last line that it printed
    seconds   of each group

`--compare` prints what differs from an earlier record and ends with 1 if a file, a tensor or an exit code does. What
differs between two runs of the same code is left out by name: see UNSTABLE.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

# Seconds stand in them, paths of the temporary folder, or the identifiers that matplotlib draws by chance.
UNSTABLE = (
    "demo/vllm.log",
    "extract/diffmean.svg",
    "extract/printed/extract-gpt2.txt",
    "extract/printed/extract-qwen3-next.txt",
    "smollm2/printed/models-show.txt",
    "texts/printed/diffmean.txt",
    "texts/printed/pca.txt",
)
RECORDS = ("*.html", "*.md", "*.svg", "*.png", "steer_merge.json", "report.json", "*.report.json")
# The texts of these are kept as files; those of all other commands as records.
TEXTS = ("texts", "smollm2")
PRINTED = "printed"

ANY_NUMBER = (
    "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "iso_c", "karcher",
    "linear", "model_stock", "multislerp", "sce", "task_arithmetic", "ties", "tsv",
)  # fmt: skip
WEIGHTED = (
    "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "linear", "multislerp",
    "task_arithmetic", "ties",
)  # fmt: skip
PAIRS = ("arcee_fusion", "nearswap", "nuslerp", "slerp")
OF_DELTAS = tuple(name for name in ANY_NUMBER if name not in ("karcher", "linear"))
GLOBAL = ("breadcrumbs", "breadcrumbs_ties", "ties")
STORAGES = ("exact", "bf16", "lowrank:4", "sparse:0.25")

WIDE = {"intermediate_size": 96}  # twice the stream, which the inserted block needs
ROUTES = (
    *((name, "bias") for name in ("llama", "gpt2", "gpt-neox", "phi", "starcoder2")),
    *((name, "llama") for name in ("qwen2", "mistral", "phi3")),
    *((name, "layer") for name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3")),
    *((name, "layer") for name in ("gemma3-window", "olmo2", "lfm2")),
)
ABLATED = (
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt-neox", "phi", "starcoder2", "mixtral", "lfm2",
    "qwen3-next", "gemma", "gemma2", "gemma3", "olmo2",
)  # fmt: skip

WARM = ["you are dear to me", "what a lovely day friend", "I am so glad for you", "take good care of you"] * 3
COLD = ["the form is incomplete", "submit the document now", "no further reply follows", "the request is denied"] * 3

Stage = dict[str, str]  # commands by name, which may run side by side; what is printed lies under the name


class Place(NamedTuple):
    """Where a group works, and what it is made of."""

    folder: Path
    pico: ModuleType
    examples: Path


def noise(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, float32."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_lines(file: Path, values: Iterable[Any]) -> None:
    """A file of JSON lines."""
    file.write_text("\n".join(map(json.dumps, values)))


def vector(file: Path, layers: dict[int, torch.Tensor]) -> None:
    """A bare steering vector: directions by layer, and no metadata."""
    save_file({f"layer.{i}": tensor for i, tensor in layers.items()}, file)


# --- merge


def fine_tunes(place: Place, prefix: str, dtype: torch.dtype) -> None:
    """A base and three fine-tunes of it, the second in many files, with tokenizers."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        model, folder = place.pico.build("llama"), place.folder / f"{prefix}{name}"
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.add_((seed > 0) * noise(100 * seed + number, *parameter.shape, scale=0.02))
        model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if name == "b" else "5GB")
        place.pico.tokenizer().save_pretrained(folder)


def large(folder: Path) -> None:
    """A base and three fine-tunes with tensors of more than a million elements, which are cut into pieces."""
    hidden, words = 256, 6000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (words, hidden)
    for i in range(2):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (3 * hidden, hidden)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden}
    for seed, name in enumerate(("base", "a", "b", "c")):
        made = {}
        for number, (key, shape) in enumerate(sorted(shapes.items())):
            tuned = noise(1000 * seed + number, *shape, scale=0.05 * (seed > 0))
            made[key] = (noise(number, *shape) + tuned).to(torch.bfloat16)
        target = folder / f"large-{name}"
        target.mkdir()
        save_file(made, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "vocab_size": words}))


def adapter(folder: Path) -> None:
    """A PEFT folder for one projection of layer 1."""
    folder.mkdir()
    at = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    save_file(
        {f"{at}A.weight": noise(5, 2, 32), f"{at}B.weight": noise(6, 32, 2)}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def vocabulary(folder: Path, tokens: list[str], seed: int) -> None:
    """A model with a small tokenizer of these tokens."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (len(tokens), 8), "lm_head.weight": (len(tokens), 8)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (24, 8) for i in range(3)}
    made = {name: noise(10 * seed + number, *shape) for number, (name, shape) in enumerate(sorted(shapes.items()))}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokens)}))
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def statistics(place: Place, name: str, seed: int) -> None:
    """Files of Fisher information and of inner products for a fine-tune."""
    weights = place.pico.build("llama").state_dict()
    fisher = {key: noise(seed + i, *t.shape).square() for i, (key, t) in enumerate(sorted(weights.items()))}
    inputs = {key: noise(seed + i, 50, t.shape[1]) for i, (key, t) in enumerate(sorted(weights.items())) if t.ndim == 2}
    save_file(fisher, place.folder / f"{name}.fisher.safetensors")
    save_file({key: rows.T @ rows for key, rows in inputs.items()}, place.folder / f"{name}.gram.safetensors")


def recipes() -> dict[str, dict[str, Any]]:
    """Recipes of ours and of mergekit's, by name. JSON is YAML too."""
    both, all_ = [{"model": "a"}, {"model": "b"}], [{"model": name} for name in "abc"]
    graded: list[dict[str, Any]] = [
        {"model": "a", "density": [0.1, 0.4], "weight": [0.2, 1, 0.5]},
        {
            "model": "b",
            "weight": [{"filter": "*.mlp.*", "value": 2}, {"filter": "attn", "value": [0, 1]}, {"value": 0}],
        },
        {"model": "c"},
    ]
    stacked = [
        {"sources": [{"model": "a", "layers": [0, 2]}]},
        {"sources": [{"model": "b", "layers": [1, 4]}]},
        {"sources": [{"model": "a", "layers": [3, 4], "parameters": {"scale": 2.0}}]},
    ]
    last = [{"model": "a", "layers": [1, 4]}, {"model": "b", "layers": [1, 4], "parameters": {"weight": 3}}]
    whole = [{"sources": [{"model": name, "layers": [0, 4]} for name in "ab"]}]
    own = [{"base": base, "sources": [{"model": name, "layers": [0, 4]}]} for name, base in (("b", "base"), ("c", "a"))]
    words = [{"model": name} for name in ("v1", "v2")]
    tokens = {
        "x": {"source": "v2", "token": "w"}, "y": {"source": "zero", "force": False},
        "z": {"source": "v1", "token": 1}, "w": {"source": "v2", "force": False},
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {
        "graded": {"method": "ties", "base": "base", "models": graded, "parameters": {"lambda": 0.9}},
        "graded-global": {"method": "ties", "base": "base", "models": graded[1:], "scope": "global"},
        "graded-dare": {"method": "dare_ties", "base": "base", "models": graded, "seed": 3},
        "stacked": {"method": "passthrough", "models": both, "slices": stacked},
        "last": {
            "method": "linear", "models": both, "dtype": "float32",
            "slices": [{"sources": [{"model": "a", "layers": [0, 1]}]}, {"sources": last}],
        },
        "sliced-global": {"method": "ties", "base": "base", "models": both, "slices": whole, "scope": "global"},
        "own-base": {"method": "task_arithmetic", "base": "base", "models": [*both, {"model": "c"}], "slices": own},
        "union": {
            "method": "linear", "base": "vb", "models": [{"model": "vb"}, *words],
            "tokenizer": {"source": "union", "tokens": {"z": {"source": "v2"}}},
        },
        "forced": {
            "method": "linear", "models": [words[0] | {"weight": 0.25}, words[1] | {"weight": 0.75}],
            "tokenizer": {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8},
        },
        "vocabulary-of-base": {
            "method": "task_arithmetic", "base": "vb", "models": words, "tokenizer": {"source": "base"},
        },
        "fisher": {"method": "fisher", "models": [{"model": n, "fisher": f"{n}.fisher.safetensors"} for n in "abc"]},
        "regmean": {"method": "regmean", "models": [{"model": n, "gram": f"{n}.gram.safetensors"} for n in "abc"]},
    }  # fmt: skip
    for name in ("alpaca", "chatml", "exaone", "llama3", "mistral", "auto"):
        found[f"chat-{name}"] = {"method": "linear", "models": both, "chat_template": name}
    for name in (*ANY_NUMBER, *PAIRS):
        if name not in ("iso_c", "tsv"):
            models = both if name in PAIRS else all_
            base = "a" if name in ("arcee_fusion", "nearswap", "slerp") else "base"
            made: dict[str, Any] = {"merge_method": name, "base_model": base, "models": models, "dtype": "bfloat16"}
            if name in (*WEIGHTED, "nuslerp"):
                made["models"] = [
                    m | {"parameters": {"weight": w}} for m, w in zip(models, (1, 0.5, 0.8), strict=False)
                ]
            if name in OF_DELTAS and name in WEIGHTED and name not in ("multislerp", "task_arithmetic"):
                made["parameters"] = {"density": 0.5, "normalize": True, "int8_mask": True}
            if name == "slerp":
                made["parameters"] = {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]}
            found[f"mergekit-{name}"] = made
    rows = [{"sources": [{"model": name, "layer_range": [0, 4]} for name in "ab"], "parameters": {"t": [0, 1]}}] * 2
    found["mergekit-slices"] = {"merge_method": "slerp", "base_model": "a", "slices": rows, "dtype": "float32"}
    found["mergekit-rescale"] = {
        "merge_method": "ties", "base_model": "base", "models": [{"model": "base"}, *both],
        "parameters": {"rescale": True, "normalize": False, "density": [0.2, 0.8], "weight": 1.0},
        "chat_template": "auto", "tokenizer_source": "base",
    }  # fmt: skip
    return found


def merge(place: Place) -> Iterator[Stage]:
    """Every method, storage, form of a recipe and kind of an input."""
    folder = place.folder
    for prefix, dtype in (("", torch.bfloat16), ("f-", torch.float32), ("h-", torch.float16)):
        fine_tunes(place, prefix, dtype)
    large(folder)
    adapter(folder / "lora")
    vocabulary(folder / "vb", ["x", "y", "z"], 1)
    vocabulary(folder / "v1", ["y", "x", "new", "both"], 2)
    vocabulary(folder / "v2", ["x", "z", "both", "w"], 3)
    for seed, name in enumerate("abc", 1):
        statistics(place, name, 1000 * seed)
    for name, recipe in recipes().items():
        (folder / f"{name}.yaml").write_text(json.dumps(recipe, indent=1))
    yield methods_listed() | dict(models()) | dict(differences())
    yield dict(of_vectors())
    yield {
        "without": "merge --recipe from-expression/run.json --without b -o without",
        "verify": "merge --verify ties --json",
        "verify-of-vectors": "merge --verify ties-of-exact --json",
        "show-task": "vectors show a-exact.safetensors --json",
        "show-merged": "vectors show as-vector-ties.safetensors",
    }


def methods_listed() -> Stage:
    """What there is, so that a new method is seen."""
    return {"methods": "merge --methods --json", "dry-run": "merge a b --base base --ties --dry-run -o none"}


def models() -> Iterator[tuple[str, str]]:
    """Merges of model folders."""
    for prefix in ("", "f-"):
        inputs, base = f"{prefix}a {prefix}b {prefix}c", f"--base {prefix}base"
        for name in ANY_NUMBER:
            weights = "--weights 1,0.5,0.8" if name in WEIGHTED else ""
            yield made(f"{prefix}{name}", f"{inputs} {base} --method {name} {weights}")
        for name in PAIRS:
            yield made(f"{prefix}{name}", f"{prefix}a {prefix}b --method {name}")
        yield made(f"{prefix}passthrough", f"{prefix}b --method passthrough --set scale=0.5")
    yield made("h-ties", "h-a h-b h-c --base h-base --ties --density 0.3,0.5,0.2")
    yield made("h-linear", "h-a h-b h-c --method linear --set normalize=false --weights 0.5,0.7,-0.2")
    yield made("mixed-dtypes", "a f-b h-c --base base --ties --dtype float32")
    for name in GLOBAL:
        yield made(f"global-{name}", f"a b c --base base --method {name} --scope global --density 0.15")
    for name in OF_DELTAS:
        yield f"as-vector-{name}", f"merge a b c --base base --method {name} -o as-vector-{name}.safetensors"
    yield "as-vector-linear", "merge a b c --base base --method linear --as vector -o as-vector-linear.safetensors"
    for name in ("ties", "task_arithmetic", "dare_linear"):
        yield made(f"as-lora-{name}", f"a b --base base --method {name} --to-lora 4")
    for name in ("dare_linear", "dare_ties", "della", "della_linear"):
        for seed in (1, 7):
            yield made(f"seed-{seed}-{name}", f"a b c --base base --method {name} --seed {seed} --density 0.3")
        for how in ("l1", "none"):
            yield made(f"rescale-{how}-{name}", f"f-a f-b --base f-base --method {name} --set rescale={how}")
    after = "--set elect=after --set zero=positive --set combine=sum"
    for name in ("ties", "breadcrumbs_ties", "dare_ties", "della"):
        yield made(f"after-{name}", f"a b c --base base --method {name} {after} --weights 1,-0.5,2 --lambda 0.7")
    for name in ("ties", "breadcrumbs"):
        yield made(f"l1-{name}", f"a b c --base base --method {name} --set rescale=l1 --density 0.1")
    yield made("normalized", "a b c --base base --method task_arithmetic --set normalize=true --weights 1,2,3")
    yield made("row-wise", "a b c --base base --method model_stock --set filter_wise=true")
    yield made("rows", "f-a f-b --base f-base --method nuslerp --set along=rows --weights 0.3,0.7")
    yield made("columns", "f-a f-b --method nuslerp --set along=columns --weights 0.3,0.7")
    yield made("multislerp-no-base", "f-a f-b f-c --method multislerp --weights 1,0.5,0.8 --set normalize=false")
    yield made("topk", "a b c --base base --method sce --set select_topk=0.3")
    yield made("quarter", "f-a f-b --method slerp --set t=0.25")
    yield made("as-float32", "a b --base base --ties --dtype float32")
    yield made("as-float16", "a b --base base --ties --dtype float16")
    yield made("adapter", "lora a --base base --method task_arithmetic --weights 0.5,1")
    yield made("on-adapter", "base+lora b --method linear")
    yield made("adapter-to-lora", "lora b --base base --method task_arithmetic --to-lora 8")
    for threads in (1, 2, 3):
        for name in ("ties", "dare_ties", "sce"):
            yield made(f"threads-{threads}-{name}", f"a b c --base base --method {name} --threads {threads}")
    for name in recipes():
        yield made(f"recipe-{name}", f"--recipe {name}.yaml")
    inputs = "large-a large-b large-c --base large-base"
    for name in ("breadcrumbs_ties", "dare_ties", "della", "karcher", "model_stock", "multislerp", "sce", "ties"):
        yield made(f"large-{name}", f"{inputs} --method {name}")
    for name in ("arcee_fusion", "nearswap", "nuslerp", "slerp"):
        yield made(f"large-{name}", f"large-a large-b --method {name}")
    for name in GLOBAL:
        yield made(f"large-global-{name}", f"{inputs} --method {name} --scope global --density 0.15 --threads 2")
    yield made("large-one-thread", f"{inputs} --ties --threads 1 --memory 160MiB")
    yield "large-as-vector", f"merge {inputs} --ties -o large-as-vector.safetensors"


def made(name: str, words: str) -> tuple[str, str]:
    """A merge whose output has the name of the command."""
    return name, f"merge {words} -o {name}"


def differences() -> Iterator[tuple[str, str]]:
    """Task vectors in every storage, and as adapters."""
    for storage in STORAGES:
        kind = storage.partition(":")[0]
        for name in "abc":
            yield f"diff-{name}-{kind}", f"diff base {name} -o {name}-{kind}.safetensors --storage {storage}"
        yield f"diff-f-a-{kind}", f"diff f-base f-a -o f-a-{kind}.safetensors --storage {storage}"
        yield f"diff-large-{kind}", f"diff large-base large-a -o large-a-{kind}.safetensors --storage {storage}"
    yield "diff-dtypes", "diff base h-b -o dtypes.safetensors --json"
    yield "diff-itself", "diff base base -o nothing.safetensors"
    yield "diff-lora", "diff base a --to-lora 4 -o a-lora"
    yield "diff-large-lora", "diff large-base large-a --to-lora 8 -o large-a-lora"


def of_vectors() -> Iterator[tuple[str, str]]:
    """Merges of task vectors, whose base is found by itself, and what `apply` makes of them."""
    for storage in STORAGES:
        kind = storage.partition(":")[0]
        yield made(f"ties-of-{kind}", f"a-{kind}.safetensors b-{kind}.safetensors c-{kind}.safetensors --ties")
        yield f"apply-{kind}", f"apply base b-{kind}.safetensors -o apply-{kind}"
        yield f"apply-f-{kind}", f"apply f-base f-a-{kind}.safetensors -o apply-f-{kind}"
    bound = "--vector a=a-exact.safetensors --vector b=b-bf16.safetensors --vector c=c-sparse.safetensors"
    yield made("from-expression", f"--expr 'a + 0.6*b - 0.5*c' {bound}")
    yield "apply-expression", f"apply base 'a - 0.5*b' {bound} -o apply-expression --dtype float32 --threads 2"
    yield "apply-adapter", "apply base a-lora -o apply-adapter"
    yield "apply-dtypes", "apply base dtypes.safetensors -o apply-dtypes"
    yield made("vector-and-model", "a-exact.safetensors b --base base --method dare_ties --seed 2")
    yield "vectors-as-vector", "merge a-exact.safetensors b-lowrank.safetensors --ties -o vectors-as-vector.safetensors"
    yield made("merged-vector", "as-vector-ties.safetensors --method task_arithmetic")
    yield made("large-vectors", "large-a-exact.safetensors large-as-vector.safetensors --ties --scope global")


# --- fold


def fold(place: Place) -> Iterator[Stage]:
    """Every route on every architecture that it takes, and ablations."""
    folder, hidden, layers = place.folder, place.pico.HIDDEN, range(place.pico.LAYERS)
    drawn = {name: {i: noise(10 * seed + i, hidden) for i in layers} for seed, name in enumerate(("warm", "calm"), 3)}
    for name, found in drawn.items():
        vector(folder / f"{name}.safetensors", {i: 2 * d / d.norm() for i, d in found.items()})
    vector(folder / "same.safetensors", {i: noise(1, hidden) for i in layers})
    write_lines(folder / "prompts.jsonl", ["the warm and the cold", "yes", "user: is the cold warm?"])
    changes: dict[str, dict[str, Any]] = {"": {}, "-wide": WIDE, "-tied": {"tie_word_embeddings": True}}
    for name in sorted({name for name, _ in ROUTES} | set(ABLATED)):
        for suffix, settings in changes.items():
            place.pico.save(folder / f"{name}{suffix}", name, **settings)
    place.pico.save(folder / "llama-bf16", "llama", dtype=torch.bfloat16)
    common = "--mode fold --any-base --skip-vllm --prompts prompts.jsonl"

    def folded(out: str, model: str, composition: str, more: str = "") -> tuple[str, str]:
        return out, f"bake {shlex.quote(composition)} --model {model} {common} {more} -o {out}"

    stage = [
        folded(
            f"{name}-via-{via}", f"{name}{'-wide' * (via == 'layer')}", "1.5*warm[1,2] - 0.5*calm[0]", f"--via {via}"
        )
        for name, via in ROUTES
    ]
    stage += [folded(f"{name}-ablated", name, "ablate(calm[2])") for name in ABLATED]
    stage += [folded(f"{name}-tied-ablated", f"{name}-tied", "ablate(calm[2])") for name in ("llama", "gpt2", "gemma2")]
    stage += [
        folded("qwen3-both", "qwen3-wide", "warm[1,2] + ablate(calm[2], 0.5) + calm[0]"),
        folded("gpt2-both", "gpt2", "warm[1] + ablate(calm[2])"),
        folded("phi-both", "phi", "warm[1] + ablate(calm[2])"),
        folded("llama-everywhere", "llama", "ablate(same)"),
        folded("llama-bf16-ablated", "llama-bf16", "ablate(calm[2])"),
        folded("llama-bf16-added", "llama-bf16", "warm[1]"),
        folded("llama-one-thread", "llama", "warm[1]", "--threads 1"),
        ("llama-auto", "bake 2*warm[1] --model llama --any-base --skip-vllm -o llama-auto"),
    ]
    yield dict(stage)


# --- bake


def bake(place: Place) -> Iterator[Stage]:
    """Every mode, output, optimiser and context, a few steps each."""
    folder, pico = place.folder, place.pico
    pico.save(folder / "model", "llama")
    speaking = pico.build("llama")
    speaking.lm_head.weight.mul_(2)  # surer of its words, which random models are not: else they are no text to it
    speaking.save_pretrained(folder / "speaking")
    pico.tokenizer().save_pretrained(folder / "speaking")
    direction = noise(4, pico.HIDDEN)
    vector(folder / "warm.safetensors", {1: 4 * direction / direction.norm()})
    words = ("sun", "rain", "warm", "cold")
    asked = [f"{a} {b}?" for a in words for b in words]
    write_lines(folder / "prompts.jsonl", asked)
    for name in ("warm", "cold"):
        lines = [{"prompt": prompt, "completion": f" the {name} and the {name}"} for prompt in asked]
        write_lines(folder / f"{name}.jsonl", lines)
    sides = {"positive": " the warm and the warm", "negative": " the cold no"}
    write_lines(folder / "pairs.jsonl", [{"prompt": prompt, **sides} for prompt in asked])
    write_lines(folder / "general.jsonl", [{"text": f"{a} is {b} and the {a}"} for a in words for b in words])
    short = "--any-base --steps 8 --lr 1e-2"

    def baked(out: str, words: str, *, model: str = "model", mix: str = "--mix 0.2") -> tuple[str, str]:
        return out.removesuffix(".safetensors"), f"bake {words} --model {model} {short} {mix} -o {out}"

    distil = "--mode distil --tokens 8 --prompts prompts.jsonl"
    # No --pos beside warm.jsonl in training: what is trained on is refused as held-out data.
    train, judged = "--mode train --data warm.jsonl", "--pos warm.jsonl --neg cold.jsonl"
    stage = [
        baked("distilled", f"warm {distil} {judged}", model="speaking"),
        baked("distilled-vector.safetensors", f"warm {distil} --as vector", model="speaking"),
        baked("distilled-lora", f"warm {distil} --as lora --lora-rank 4 --lora-alpha 8", model="speaking"),
        baked("distilled-response", f"'2*warm@response' {distil} --temperature 0.7 --seed 3", model="speaking"),
        baked("distilled-full", f"warm {distil} --full", model="speaking"),
        baked("distilled-frozen", f"warm {distil} --context frozen", model="speaking"),
        baked("prompted", f"--teacher-prompt 'warm warm the sun is warm' {distil} {judged}", model="speaking"),
        baked("trained", train),
        baked("trained-vector.safetensors", f"{train} --as vector"),
        baked("trained-lora", f"{train} --as lora --preset attention"),
        baked("trained-targets", f"{train} --as lora --lora-targets q_proj,v_proj --schedule linear --warmup 0.3"),
        baked("trained-frozen", f"{train} --context frozen"),
        baked("trained-checkpointing", f"{train} --checkpointing --accumulate 2 --batch 4 --weight-decay 0.1"),
        baked("trained-mixed", train, mix="--mix general.jsonl:0.25"),
        baked("trained-alone", f"{train} --evaluate-every 4 --seed 5", mix="--mix 0"),
        baked("trained-bf16", f"{train} --full --dtype bfloat16", mix="--mix 0"),
        ("trained-compared", f"bake {train} --model model --any-base --steps 4 --compare-mix -o trained-compared"),
        ("trained-grid", f"bake {train} --model model --any-base --steps 8 --lr auto --mix 0 -o trained-grid"),
        baked("preferred", "--mode train --pairs pairs.jsonl"),
        baked("contrasted.safetensors", f"{train} --against cold.jsonl --as vector", mix="--mix 0"),
        baked("contrasted-model", f"{train} --against cold.jsonl", mix="--mix 0"),
    ]
    for optimiser, more in (("adamw", ""), ("apollo", "--set rank=8"), ("apollo_mini", ""), ("muon", "")):
        stage.append(baked(f"full-{optimiser}", f"{train} --full --optimiser {optimiser} {more}", mix="--mix 0"))
    stage.append(baked("lora-muon", f"{train} --as lora --optimiser muon", mix="--mix 0"))
    yield dict(stage)


# --- extract


def written_examples(place: Place) -> None:
    """Texts of both classes of unequal number, pairs, statements, and the bundled model's own examples."""
    for name, texts in (("warm", WARM), ("cold", COLD[:10])):
        write_lines(place.folder / f"{name}.jsonl", [{"text": f"{text} {i}"} for i, text in enumerate(texts)])
    pairs = [
        {"prompt": f"p {i}", "positive": a, "negative": b} for i, (a, b) in enumerate(zip(WARM, COLD, strict=True))
    ]
    write_lines(place.folder / "pairs.jsonl", pairs)
    said = [(" Yes", text) for text in WARM[:8]] + [(" No", text) for text in COLD[:8]]
    rows = [{"question": "q", "statement": text, "answer_matching_behavior": answer} for answer, text in said]
    write_lines(place.folder / "persona.jsonl", rows)


def extract(place: Place) -> Iterator[Stage]:
    """Every method with every choice of tokens on pico models; conversions and merges of what was found."""
    written_examples(place)
    names = ("llama", "gpt2", "qwen3-next")
    for name in names:
        place.pico.save(place.folder / name, name)
    files, stage = "--pos warm.jsonl --neg cold.jsonl", {}
    for method in ("diffmean", "whitened", "pca", "logistic"):
        for tokens in ("completion", "last", "all", "-2"):
            out = f"{method}{'' if tokens == 'completion' else tokens.replace('-', '.')}"
            words = f"--model llama --method {method} --tokens {tokens} --out {out}.safetensors"
            stage[f"extract-{out}"] = f"extract {files} {words}"
        stage[f"extract-{method}-pairs"] = (
            f"extract --pairs pairs.jsonl --model llama --method {method} --out {method}-pairs.safetensors"
        )
    for name in names[1:]:
        stage[f"extract-{name}"] = f"extract {files} --model {name} --layers 1-2 --out {name}.safetensors --json"
    stage |= {
        "extract-persona": "extract --pairs persona.jsonl --model llama",
        "extract-bf16": f"extract {files} --model llama --dtype bfloat16 --out bf16.safetensors",
        "extract-seed": f"extract {files} --model llama --seed 3 --layers 2 --out seed.safetensors",
    }
    yield stage
    suffixes = {"native": "safetensors", "gguf": "gguf", "caa": "pt", "persona_vectors": "pt", "lm_eval": "pt"}
    stage = {}
    for name, suffix in suffixes.items():
        for layers, more in (("", ""), ("-all", "--layers all"), ("-some", "--layers 1-2")):
            if name == "caa" or layers != "-all" or name == "native":
                out = f"{name}{layers}.{suffix}"
                stage[f"convert-{name}{layers}"] = f"vectors convert diffmean.safetensors {out} --format {name} {more}"
    inputs = "diffmean.safetensors whitened.safetensors pca.safetensors"
    for method in (*ANY_NUMBER, "slerp", "nuslerp"):
        some = inputs if method in ANY_NUMBER else "diffmean.safetensors pca.safetensors"
        stage[f"merge-{method}"] = f"merge {some} --method {method} -o merged-{method}.safetensors"
    stage["merge-weighted"] = f"merge {inputs} --ties --weights 1,0.5,-1 --density 0.5 -o weighted.safetensors --json"
    stage["plot"] = "vectors plot diffmean.safetensors -o diffmean.svg"
    yield stage
    back = {
        "gguf": "gguf-some.gguf",
        "caa": "caa.pt",
        "persona_vectors": "persona_vectors-some.pt",
        "lm_eval": "lm_eval.pt",
    }
    yield {f"back-{name}": f"vectors convert {file} back-{name}.safetensors" for name, file in back.items()}


def smollm2(place: Place) -> Iterator[Stage]:
    """Every method on the bundled model, which is converted first."""
    for name in ("warm", "cold"):
        shutil.copy(place.examples / f"{name}.jsonl", place.folder)
    yield {"models-show": "models show smollm2 --json"}
    files = "--pos warm.jsonl --neg cold.jsonl --layers 12-14"
    yield {
        f"extract-{method}": f"extract {files} --method {method} --out {method}.safetensors"
        for method in ("diffmean", "whitened", "pca", "logistic")
    }
    asked = "-p 'How was your day?' -p 'Good morning!' --max-tokens 12"
    yield {
        "try": f"try diffmean.safetensors {asked}",
        "try-greedy": f"try diffmean.safetensors {asked} --temperature 0 --strengths 0,1,2",
        "try-expression": f"try '1.5*diffmean@response - 0.5*pca[13] + ablate(whitened[12])' {asked} --strengths 0,1",
        "try-prompt": f"try 'logistic[12-13]@prompt' {asked} --strengths 1 --seed 4",
        "show": "vectors show diffmean.safetensors",
        "show-json": "vectors show whitened.safetensors --json",
        "compare": "vectors compare diffmean.safetensors logistic.safetensors",
        "compare-json": "vectors compare pca.safetensors whitened.safetensors --json",
    }


def texts(place: Place) -> Iterator[Stage]:
    """What is printed of vectors of a pico model, and what it says with them."""
    written_examples(place)
    place.pico.save(place.folder / "llama", "llama")
    files = "--pos warm.jsonl --neg cold.jsonl --model llama"
    yield {name: f"extract {files} --method {name} --out {name}.safetensors --json" for name in ("diffmean", "pca")}
    asked = "-p 'hello there' -p 'good day' --model llama --max-tokens 12"
    yield {
        "try": f"try diffmean.safetensors {asked}",
        "try-json": f"try 'diffmean[1-2] - pca' {asked} --strengths 0,3 --seed 2 --json",
        "show": "vectors show diffmean.safetensors",
        "show-json": "vectors show pca.safetensors --json",
        "compare": "vectors compare diffmean.safetensors pca.safetensors",
        "compare-json": "vectors compare diffmean.safetensors pca.safetensors --json",
    }


GROUPS: dict[str, Callable[[Place], Iterator[Stage]]] = {
    "merge": merge, "fold": fold, "extract": extract, "texts": texts, "smollm2": smollm2, "bake": bake,
}  # fmt: skip


# --- running and hashing


def environment(cache: Path) -> dict[str, str]:
    """One thread of OpenMP, no network, a cache of our own, one width of the terminal."""
    own = {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false", "XDG_CACHE_HOME": str(cache), "COLUMNS": "100", "NO_COLOR": "1",
    }  # fmt: skip
    return os.environ | own


def run(steer: list[str], folder: Path, stage: Stage, jobs: int, variables: dict[str, str]) -> dict[str, str]:
    """Run the commands of a stage in the folder; the failed ones, and why."""

    def one(item: tuple[str, str]) -> tuple[str, str] | None:
        name, words = item
        command = [*steer, *shlex.split(words)]
        done = subprocess.run(command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True)
        (folder / PRINTED / f"{name}.txt").write_bytes(done.stdout)
        if not done.returncode:
            return None
        said = done.stderr.decode(errors="replace")
        why = next((line for line in said.splitlines() if line.startswith("error: ")), said.strip()[-200:])
        return name, f"{done.returncode}, {why}"

    with ThreadPoolExecutor(jobs) as pool:
        return dict(found for found in pool.map(one, stage.items()) if found is not None)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_digest(file: Path) -> str | None:
    """The SHA-256 of what a safetensors file holds, by names in order, whatever its metadata and layout."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start, found = stream.tell(), hashlib.sha256()
        for name in sorted(set(header) - {"__metadata__"}):
            entry = header[name]
            begin, end = entry["data_offsets"]
            stream.seek(start + begin)
            found.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            found.update(stream.read(end - begin))
    return found.hexdigest()


def digests(folder: Path, root: Path) -> dict[str, dict[str, str]]:
    """Of all files below the folder, by path relative to the root: files, tensors, records."""
    found: dict[str, dict[str, str]] = {"files": {}, "tensors": {}, "records": {}}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(root).as_posix()
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in UNSTABLE):
            continue
        printed = file.parent.name == PRINTED and not (
            path.split("/")[0] in TEXTS and file.name.startswith(("try", "show", "compare"))
        )
        record = printed or any(fnmatch.fnmatchcase(file.name, pattern) for pattern in RECORDS)
        found["records" if record else "files"][path] = digest(file)
        if file.suffix == ".safetensors":
            found["tensors"][path] = tensors_digest(file) or ""
    return found


def record(groups: list[str], root: Path, steer: list[str], tests: Path, jobs: int) -> dict[str, Any]:
    """Run the groups below `root`; what they wrote."""
    specification = importlib.util.spec_from_file_location("pico", tests / "pico.py")
    assert specification is not None
    assert specification.loader is not None
    pico = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pico)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    result: dict[str, Any] = {"files": {}, "tensors": {}, "records": {}, "failed": {}, "seconds": {}}
    for name in groups:
        started, folder = time.monotonic(), root / name
        (folder / PRINTED).mkdir(parents=True)
        commands = 0
        for stage in GROUPS[name](Place(folder, pico, tests.parent / "examples" / "data")):
            failed = run(steer, folder, stage, jobs, environment(root / "cache"))
            result["failed"] |= {f"{name}/{command}": why for command, why in failed.items()}
            commands += len(stage)
        for kind, found in digests(folder, root).items():
            result[kind] |= found
        result["seconds"][name] = round(time.monotonic() - started, 1)
        print(f"{name}: {commands} commands, {result['seconds'][name]} s", file=sys.stderr, flush=True)
    for kind, found in digests(root / "cache" / "steer" / "models", root).items():
        result[kind] |= {path: sha for path, sha in found.items() if not path.endswith(".lock")}
    return result


def record_demo(python: str, tree: Path, root: Path) -> dict[str, Any]:
    """What the demo of a tree leaves in its folder, made anew."""
    started, demo = time.monotonic(), tree / "demo"
    shutil.rmtree(demo, ignore_errors=True)
    command = [python, str(tree / "examples" / "demo.py")]
    done = subprocess.run(command, cwd=tree, env=environment(root / "cache"), capture_output=True)
    demo.mkdir(exist_ok=True)
    (demo / PRINTED).mkdir(exist_ok=True)
    (demo / PRINTED / "demo.txt").write_bytes(done.stdout)
    why = done.stderr.decode(errors="replace").strip()[-500:]
    failed = {"demo": f"{done.returncode}, {why}"} if done.returncode else {}
    found: dict[str, Any] = {**digests(demo, tree), "failed": failed}
    return {**found, "seconds": {"demo": round(time.monotonic() - started, 1)}}


def differences_between(old: dict[str, Any], new: dict[str, Any], groups: list[str]) -> bool:
    """Print what differs in these groups; whether anything but records does."""
    worse = False
    tops = {*groups, "cache"} if "smollm2" in groups else set(groups)  # the bundled model is converted for that one
    for kind in ("failed", "tensors", "files", "records"):
        before, after = (
            {path: sha for path, sha in found[kind].items() if path.split("/")[0] in tops} for found in (old, new)
        )
        other = sorted(path for path in before.keys() & after.keys() if before[path] != after[path])
        gone, come = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        print(f"{kind}: {len(after)}, of which {len(other)} differ, {len(gone)} are missing, {len(come)} are new")
        for word, paths in (("differs", other), ("missing", gone), ("new", come)):
            for path in paths:
                print(f"    {word} {path}" + (f": {after.get(path, before.get(path))}" if kind == "failed" else ""))
        worse |= kind != "records" and bool(other or gone or come)
    return worse


def main() -> int:
    """Record, and compare where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--steer", default=f"{shlex.quote(sys.executable)} -m steer", help="the command that is run")
    parser.add_argument(
        "--tests", type=Path, default=Path(__file__).parents[1], help="the folder in which pico.py lies"
    )
    parser.add_argument("--only", default=",".join(GROUPS), help=f"of {','.join(GROUPS)}, or demo alone")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run side by side")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave everything there")
    parser.add_argument("--compare", type=Path, metavar="BEFORE.json", help="print what differs from that record")
    given = parser.parse_args()
    groups, steer, tests = given.only.split(","), shlex.split(given.steer), given.tests.resolve()
    if set(groups) - set(GROUPS) and groups != ["demo"]:
        parser.error(f"--only takes {','.join(GROUPS)}, or demo alone")
    if not (tests / "pico.py").is_file():
        parser.error(f"there is no pico.py in {given.tests}: name the folder with --tests")
    root = Path(tempfile.mkdtemp()) if given.keep is None else given.keep.resolve()
    root.mkdir(parents=True, exist_ok=True)
    try:
        if groups == ["demo"]:
            found = record_demo(steer[0], tests.parent, root)
        else:
            found = record(groups, root, steer, tests, given.jobs)
    finally:
        if given.keep is None:
            shutil.rmtree(root)
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{len(found['files'])} files, {len(found['records'])} records", file=sys.stderr)
    for name, why in found["failed"].items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if given.compare is None:
        return bool(found["failed"])
    return differences_between(json.loads(given.compare.read_text()), found, groups)


if __name__ == "__main__":
    sys.exit(main())
