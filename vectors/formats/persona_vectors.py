"""The stacks of Persona Vectors: a tensor [layers + 1, hidden], such as `{trait}_response_avg_diff.pt`.

Row l is a difference of means of `hidden_states[l]`, so it is our layer l - 1, and row 0 (the embeddings) is dropped;
its authors also steer block l - 1 with row l. A row of zeros stands for a missing layer. The last row is
`hidden_states[-1]`, which most models of transformers return after the final norm, so it differs somewhat from the
output of the last block.

Source: safety-research/persona_vectors `generate_vec.py`, `eval/eval_persona.py` (arXiv 2507.21509).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vectors.errors import ArtifactError
from vectors.formats import _pt
from vectors.formats._common import AGAIN, dense, direction, imported, save
from vectors.steering import SteeringVector

SUMMARY = ".pt stack [layers + 1, hidden] of Persona Vectors"
SUFFIXES = ()


def reads(path: Path) -> bool:
    """Whether the file holds one tensor of two dimensions, with more rows than the embeddings'."""
    value = _pt.load(path)
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] > 1


def read(path: Path) -> SteeringVector:
    """Read a stack [layers + 1, hidden] of any float dtype. Warns that the base is unverified. Raises ArtifactError."""
    stack = _pt.load(path)
    if not isinstance(stack, Tensor) or stack.ndim != 2:
        raise ArtifactError(f"{path} does not hold a stack [layers + 1, hidden]", AGAIN)
    rows = {i: direction(path, f"row {i + 1}", row) for i, row in enumerate(dense(path, "the stack", stack)[1:])}
    layers = {i: row for i, row in rows.items() if bool(row.any())}
    if not layers:
        raise ArtifactError(f"{path} holds only zeros", AGAIN)
    return imported(path, layers, "persona_vectors")


def write(path: Path, vector: SteeringVector) -> str:
    """Write a stack: row i + 1 for layer i, zeros for row 0 and for layers that the vector lacks.

    It has one row more than the base has layers, or if that is unknown, than the highest layer needs. The format has no
    metadata. Raises ArtifactError when the vector has a layer that its base lacks.
    """
    known = vector.base.get("layers")
    count = known if type(known) is int else max(vector.layers) + 1
    if max(vector.layers) >= count:
        raise ArtifactError(
            f"the vector has a layer {max(vector.layers)}, its base only {count} layers", "check how it was made"
        )
    stack = torch.zeros(count + 1, vector.hidden_size)
    for i, values in vector.layers.items():
        stack[i + 1] = values
    return save(path, _pt.dump(stack))
