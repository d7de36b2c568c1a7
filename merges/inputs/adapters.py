"""LoRA adapters in PEFT's format, read as low-rank deltas that stay factored, and the factors of a given delta.

delta = scale * B @ A with scale = alpha / r, or alpha / sqrt(r) with rsLoRA (Hu et al. 2021, arXiv:2106.09685;
Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from merges.engine.floats import to_float32
from merges.engine.readers import Dense, LowRank, Reader
from vectors.errors import ArtifactError, ModelError
from vectors.weights import FLOATS, Entry, mapped, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SMALL = 1024  # the shorter side up to which a matrix is decomposed exactly
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")


class Adapter(NamedTuple):
    """An adapter's deltas by parameter name, and the weights that replace a parameter (PEFT's `modules_to_save`)."""

    deltas: dict[str, Reader]
    replaced: dict[str, Reader]
    base_name: str | None
    files: tuple[Path, ...]


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter: it has adapter_config.json."""
    return (folder / CONFIG).is_file()


def read(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter for a base with these parameters and shapes. Raises ArtifactError with all problems."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        entries, _ = read_header(folder / WEIGHTS)
        _ = config["r"], config["lora_alpha"]
    except ModelError as error:
        raise ArtifactError(error.problems, f"{folder} needs {WEIGHTS}; save the adapter as safetensors") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{folder / CONFIG} is damaged: {error}", "save the adapter again") from error
    problems = []
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"the adapter {folder} is {config['peft_type']}, not LORA")
    if config.get("use_dora"):
        problems.append(f"the adapter {folder} uses DoRA, whose deltas are not low-rank")
    factors: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Reader] = {}
    embeddings = set()
    for key, entry in entries.items():
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if entry.dtype not in FLOATS:
            problems.append(f"the adapter {folder} holds {key} as {entry.dtype}")
        elif match:
            factors.setdefault(match[1], {})[match["side"]] = entry
            if match["embedding"]:
                embeddings.add(match[1])
        elif "lora_" in name:
            problems.append(f"the adapter {folder} holds {key}, which is not a factor of a low-rank delta")
        else:
            parameter = _parameter(name.replace(".modules_to_save", "").replace(".base_layer", ""), shapes)
            if parameter is None or shapes[parameter] != entry.shape:
                problems.append(f"the adapter {folder} holds {key}, which matches no parameter of the base")
            else:
                replaced[parameter] = Dense(entry)
    deltas: dict[str, Reader] = {}
    for module, pair in factors.items():
        parameter = _parameter(f"{module}.weight", shapes)
        if set(pair) != {"A", "B"}:
            problems.append(f"the adapter {folder} has only one factor of {module}")
            continue
        delta = _delta(config, module, pair, module in embeddings)
        if parameter is None:
            problems.append(f"the adapter {folder} changes {module}, which the base lacks")
        elif delta is None or delta.shape != shapes[parameter]:
            actual = "factors whose shapes do not match" if delta is None else f"a delta of shape {list(delta.shape)}"
            problems.append(f"the adapter {folder} has {actual} for {parameter}, which is {list(shapes[parameter])}")
        else:
            deltas[parameter] = delta
    if not problems and not deltas and not replaced:
        problems.append(f"the adapter {folder} changes nothing")
    if problems:
        raise ArtifactError(problems, "use an adapter that PEFT saved for this base, or name its base: --base MODEL")
    return Adapter(deltas, replaced, config.get("base_model_name_or_path"), (folder / WEIGHTS, folder / CONFIG))


def _parameter(name: str, shapes: Mapping[str, Any]) -> str | None:
    """The name of a parameter in the base, which may have one outer module more or less; None if there is none."""
    if name in shapes:
        return name
    short = name.partition(".")[2]
    if short in shapes:
        return short
    longer = [known for known in shapes if known.endswith("." + name)]
    return longer[0] if len(longer) == 1 else None


def _delta(config: Mapping[str, Any], module: str, pair: Mapping[str, Entry], embedding: bool) -> LowRank | None:
    """The delta of one module, or None if the shapes of its factors do not match."""
    up, down = (to_float32(mapped(pair[side]), pair[side].dtype).reshape(pair[side].shape) for side in "BA")
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        return None
    rank = _for_module(config.get("rank_pattern"), module, config["r"])
    alpha = _for_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(up, down, scale, transpose=embedding or bool(config.get("fan_in_fan_out")))


def _for_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def factors(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best rank-`rank` approximation of a matrix: up [rows, rank], down [rank, columns], and its relative error.

    By the singular value decomposition (Eckart and Young 1936); for large matrices by subspace iteration with a fixed
    random start (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), within a percent of the best error.
    """
    wide = np.asarray(delta, np.float64)
    rank = min(rank, *wide.shape)
    if min(wide.shape) <= SMALL or rank * 3 > min(wide.shape):
        left, values, right = np.linalg.svd(wide, full_matrices=False)
    else:
        start = np.random.default_rng(0).standard_normal((wide.shape[1], rank + 16))
        basis = np.linalg.qr(wide @ start)[0]
        for _ in range(4):
            basis = np.linalg.qr(wide @ np.linalg.qr(wide.T @ basis)[0])[0]
        small, values, right = np.linalg.svd(basis.T @ wide, full_matrices=False)
        left = basis @ small
    root = np.sqrt(values[:rank])
    up, down = (left[:, :rank] * root).astype(np.float32), (root[:, None] * right[:rank]).astype(np.float32)
    norm = float(np.linalg.norm(wide))
    return up, down, float(np.linalg.norm(wide - up.astype(float) @ down)) / norm if norm else 0.0
