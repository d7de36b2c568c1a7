"""`.pt` dictionaries of directions by layer, and the single tensors of Contrastive Activation Addition.

CAA takes the output of `model.layers[i]`, so its layer i is ours. It saves one tensor [hidden] per file,
`vec_layer_{i}_{model}.pt`, with the layer only in the file's name. Most scripts derived from it save dictionaries
{layer: tensor}.

Source: nrimsky/CAA `llama_wrapper.py`, `generate_vectors.py`, `behaviors.py` (arXiv 2312.06681).
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from vectors.errors import ArtifactError
from vectors.formats import _pt
from vectors.formats._common import AGAIN, direction, imported, save
from vectors.steering import SteeringVector

SUMMARY = ".pt dictionary {layer: tensor}, or a vec_layer_{i}_{model}.pt of CAA"
SUFFIXES = (".pt",)

_KEY = re.compile(r"(?:model\.)?(?:layers?[._])?([0-9]{1,6})")
_HOOK = re.compile(r"blocks\.([0-9]{1,6})\.hook_resid_(pre|post)")  # of TransformerLens
_FILE = re.compile(r"(?:^|.*_)vec_layer_([0-9]{1,6})(?:_(.+))?")


def reads(path: Path) -> bool:
    """Whether the file holds a dictionary of tensors by layer, or a single direction."""
    value = _pt.load(path)
    if isinstance(value, dict):
        return bool(value) and all(_layer(key) is not None and isinstance(value[key], Tensor) for key in value)
    return isinstance(value, Tensor) and (value.ndim == 1 or (value.ndim == 2 and value.shape[0] == 1))


def read(path: Path) -> SteeringVector:
    """Read directions of shape [hidden] or [1, hidden], of any float dtype, by layer.

    A layer's key is its number, or a string such as `12`, `layer_12`, `model.layers.12`, or a hook of TransformerLens,
    `blocks.12.hook_resid_post` (or `_pre`, which is the output of the block before). Warns that the base is
    unverified. Raises ArtifactError.
    """
    value = _pt.load(path)
    if isinstance(value, Tensor):
        named = _FILE.fullmatch(path.stem)
        if not named:
            raise ArtifactError(
                f"{path} holds one tensor and does not give its layer",
                "name it as CAA does, vec_layer_{i}_{model}.pt, or save a dictionary {layer: tensor}",
            )
        model = {"model_hint": named[2]} if named[2] else {}
        return imported(path, {int(named[1]): direction(path, "the tensor", value)}, "caa", **model)
    layers: dict[int, Tensor] = {}
    for key in value if isinstance(value, dict) else ():
        layer = _layer(key)
        if layer is None or layer in layers:
            raise ArtifactError(f"{path}: the key {key!r} is not a layer, or occurs twice", AGAIN)
        layers[layer] = direction(path, f"layer {layer}", value[key])
    return imported(path, layers, "caa")


def write(path: Path, vector: SteeringVector) -> str:
    """Write a dictionary {layer: float32 tensor [hidden]}, with integer keys. The format has no metadata."""
    return save(path, _pt.dump({i: values.clone() for i, values in vector.layers.items()}))


def _layer(key: object) -> int | None:
    """The layer that a key names, or None."""
    if type(key) is int:
        return key if abs(key) < 10**6 else None
    if isinstance(key, str) and (hook := _HOOK.fullmatch(key)):
        # The input of block i is the output of block i - 1; that of block 0 is the embeddings, which no layer is.
        return int(hook[1]) - (hook[2] == "pre")
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    return int(match[1]) if match else None
