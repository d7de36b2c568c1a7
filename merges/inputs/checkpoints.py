"""The parameters of a model folder, from the headers of its files; and the reasons why a folder can't be merged."""

from __future__ import annotations

import os.path
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merges.engine.floats import MERGEABLE
from vectors import references
from vectors.errors import ModelError, shortened
from vectors.weights import Entry, entries_of

_POINTER = b"version https://git-lfs"
# What quantisers call the tensors that they keep beside or instead of a weight.
_QUANTISED = re.compile(
    r"(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|input_scale|SCB|absmax|quant_map"
    r"|nested_absmax|quant_state\..*|_blocks|_scales|weight_format)$"
)
_BUFFER = re.compile(r"(\.bias|masked_bias|position_ids|token_type_ids|_mask|_index|_indices|_ids)$")


def read(reference: str, folder: Path, config: Mapping[str, Any]) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    """The weight files of a model folder, and its parameters. Raises ModelError with every problem."""
    files = tuple(references.weight_files(folder))
    if not files:
        raise references.without_safetensors(reference, folder)
    missing = [f"{reference} lacks its shard {file.name}" for file in files if not os.path.isfile(file)]
    pointers = [file.name for file in files if os.path.isfile(file) and is_pointer(file)]
    if pointers:
        raise ModelError(
            f"{shortened(pointers)} of {reference} {'is a pointer' if len(pointers) == 1 else 'are pointers'} of "
            "Git LFS, not weights",
            f"fetch the weights: git -C {folder} lfs pull",
        )
    if missing:
        raise ModelError(missing, "fetch the model again")
    entries = entries_of(files)
    if not entries:
        raise ModelError(f"{reference} holds no tensors", "fetch the model again")
    _check_index(reference, folder, entries)
    _require_plain(reference, config, entries)
    return files, entries


def is_pointer(file: Path) -> bool:
    """Whether a file is a pointer of Git LFS in place of what it points to."""
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def _check_index(reference: str, folder: Path, entries: Mapping[str, Entry]) -> None:
    """Check that the shards hold the tensors that the index lists. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    lacking: dict[str, list[str]] = {}
    for name, file in references.weight_map(index).items():
        if name not in entries:
            lacking.setdefault(str(file), []).append(name)
    if lacking:
        raise ModelError(
            [f"{reference}: {file} lacks {shortened(sorted(names))}" for file, names in sorted(lacking.items())],
            "fetch the model again",
        )


def quantiser(config: Mapping[str, Any]) -> str | None:
    """The quantiser that a configuration names, with its kind; None if it names none."""
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(settings, dict) or not settings:
        return None
    name = str(settings.get("quant_method") or "an unnamed quantiser")
    if name == "bitsandbytes":
        name += ", 4 bits" if settings.get("load_in_4bit") else ", 8 bits" if settings.get("load_in_8bit") else ""
    elif settings.get("bits"):
        name += f", {settings['bits']} bits"
    return name


def is_quantised(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> bool:
    """Whether weights are packed by a quantiser, or cast to few bits, by their dtypes and names."""
    named = quantiser(config) is not None
    return any(_packed(name, entry, named) for name, entry in entries.items())


def _packed(name: str, entry: Entry, named: bool) -> bool:
    """Whether a tensor was written by a quantiser; `named` is whether the configuration names one."""
    if entry.dtype in MERGEABLE:
        return named and bool(_QUANTISED.search(name))
    if entry.dtype[0] in "FC" or _QUANTISED.search(name):
        return True
    # Integers of several dimensions, but for what buffers hold: masks, positions, indices.
    matrix = len(entry.shape) > 1 and not _BUFFER.search(name)
    return matrix and (named or entry.dtype in ("I8", "U8"))


def _require_plain(reference: str, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raise ModelError, in one sentence, for weights that are quantised or cast to dtypes that can't be merged."""
    if not is_quantised(config, entries):
        return
    quantised_by = quantiser(config)
    kinds = Counter(entry.dtype for entry in entries.values() if entry.dtype not in MERGEABLE)
    if quantised_by is not None:
        raise ModelError(
            f"{reference} is quantised ({quantised_by}), and quantised weights can't be merged",
            "use the model that was quantised, or load it with transformers, call model.dequantize(), and save that",
        )
    what = ", ".join(f"{count} as {dtype}" for dtype, count in kinds.most_common()) or "scales of a quantiser"
    first = next(name for name, entry in sorted(entries.items()) if _packed(name, entry, quantised_by is not None))
    raise ModelError(
        f"{reference} holds tensors that can't be merged ({what}; the first is {first}), and does not say what "
        "quantised them",
        "use the model in float32, bfloat16 or float16",
    )
