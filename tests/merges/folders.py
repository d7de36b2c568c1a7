"""Model folders for the tests of merging: small, in any dtype and sharding, with known weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from merges.recipes.recipe import Part, Recipe

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ADAPTED = "model.layers.1.self_attn.q_proj"  # what `adapter` changes


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    config: dict[str, Any] | None = None,
    tokenizer: bool = False,
) -> Path:
    """A model folder with these weights."""
    folder.mkdir(parents=True)
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    names = sorted(tensors)
    if shards == 1:
        save_file({n: tensors[n].contiguous() for n in names}, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: tensors[n].contiguous() for n in names[i::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if tokenizer:
        small_tokenizer().save_pretrained(folder)
    return folder


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 20 tokens, as many as `weights` has rows."""
    letters = [chr(ord("a") + i) for i in range(20 - len(pico.SPECIAL))]
    built = Tokenizer(models.BPE({token: i for i, token in enumerate([*pico.SPECIAL, *letters])}, []))
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pico.SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token=pico.PAD, bos_token=pico.BOS, eos_token=pico.EOS,
        chat_template=pico.CHAT_TEMPLATE,
    )  # fmt: skip


def exchange_two_tokens(folder: Path) -> None:
    """Give two tokens of a model folder each other's id."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def weights(seed: int, dtype: str = "BF16", hidden: int = 8, layers: int = 3) -> dict[str, torch.Tensor]:
    """Random weights under the names of a Llama."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (20, hidden)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": (3 * hidden, hidden),
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
        }
    return {name: torch.randn(shape, generator=draw).to(DTYPES[dtype]) for name, shape in sorted(shapes.items())}


def tuned(base: dict[str, torch.Tensor], seed: int, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """The weights with random changes."""
    draw = torch.Generator().manual_seed(seed)
    return {n: (t.float() + scale * torch.randn(t.shape, generator=draw)).to(t.dtype) for n, t in sorted(base.items())}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights, to the bit."""
    x, y = read(a), read(b)
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and np.array_equal(bits(x[n]), bits(y[n])) for n in x)


def adapter(
    folder: Path, *, rank: int = 2, config: dict[str, Any] | None = None, extra: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A PEFT folder for the query projection of layer 1; returns its tensors."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(5)
    tensors = {
        f"base_model.model.{ADAPTED}.lora_A.weight": torch.randn(rank, 8, generator=draw),
        f"base_model.model.{ADAPTED}.lora_B.weight": torch.randn(8, rank, generator=draw),
    } | (extra or {})
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {})))
    return tensors


def recipe(*parts: str, method: str = "ties", base: str | None = "base", **more: Any) -> Recipe:
    """`recipe("a", "b=0.5")`: the models with their weights."""
    made = []
    for part in parts:
        name, _, weight = part.partition("=")
        made.append(Part(name, Path(name).stem, {"weight": float(weight)} if weight else {}))
    return Recipe(method, tuple(made), base, **more)
