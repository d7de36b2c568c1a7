"""The tensors of an adapter_model.safetensors, by the module that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from merges.engine.readers import Dense, read_whole
from vectors.weights import Entry

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.(weight|bias))?")
_VECTOR = re.compile(r"(.+)\.(lora_magnitude_vector|ia3_l)(?:\.default)?(?:\.weight)?")
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
_TRAINING = re.compile(r"\.lora_velora_embed(\.default)?$")  # VeLoRA compresses activations, in training only
_SAVED = re.compile(r"\.(?:modules_to_save|ln_tuning_layers)(?:\.default)?(?=\.)")
_BASE = re.compile(r"\.(?:base_layer|token_adapter)(?=\.)")


@dataclass(eq=False)
class Module:
    """What an adapter holds for one module: factors, a vector of magnitudes or of scales, rows of tokens."""

    factors: dict[str, Entry] = field(default_factory=dict)  # A, B, and bias
    embedding: bool = False  # the factors are those of an embedding
    magnitude: Entry | None = None
    scales: Entry | None = None  # of (IA)3
    tokens: Entry | None = None


@dataclass(eq=False)
class Contents:
    """The tensors of an adapter: modules by name, and parameters that are replaced, by name and with their key."""

    modules: dict[str, Module]
    replaced: dict[str, tuple[str, Entry]]
    problems: list[str]


def sorted_out(entries: Mapping[str, Entry]) -> Contents:
    """Each tensor under the name of its module, as the model in memory has it; what can't be understood is a problem.

    Names that wrappers of training add (`_orig_mod` of torch.compile, those of FSDP) are left out.
    """
    contents = Contents({}, {}, [])
    for key, entry in entries.items():
        name = _WRAPPERS.sub("", key).removeprefix(_PREFIX)
        name = _WRAPPERS.sub("", name)
        if match := _FACTOR.fullmatch(name):
            module = contents.modules.setdefault(match[1], Module())
            module.factors["bias" if match[4] == "bias" else match[3]] = entry
            module.embedding |= bool(match[2])
            if match[4] == "bias" and match[3] == "A":
                contents.problems.append(f"holds {key}, which is not a factor of a low-rank delta")
        elif match := _VECTOR.fullmatch(name):
            module = contents.modules.setdefault(match[1], Module())
            if match[2] == "ia3_l":
                module.scales = entry
            else:
                module.magnitude = entry
        elif match := _TOKENS.fullmatch(name):
            contents.modules.setdefault(match[1], Module()).tokens = entry
        elif _TRAINING.search(name) or ".original_module." in name:
            continue
        elif "lora_" in name:
            contents.problems.append(f"holds {key}, which is not a factor of a low-rank delta")
        else:
            parameter = _BASE.sub("", _SAVED.sub("", name))
            before = contents.replaced.get(parameter)
            if before is not None and not same(before[1], entry):
                contents.problems.append(f"holds {parameter} twice, as {key} and as {before[0]}")
            contents.replaced[parameter] = (key, entry)
    return contents


def same(a: Entry, b: Entry) -> bool:
    """Whether two tensors hold the same numbers."""
    return a.shape == b.shape and bool(np.array_equal(read_whole(Dense(a)), read_whole(Dense(b))))
