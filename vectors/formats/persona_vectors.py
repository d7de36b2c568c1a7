"""Stacks of rows by layer in one `.pt`: those of Persona Vectors [layers + 1, hidden], and others [layers, hidden].

In a stack of Persona Vectors, such as `{trait}_response_avg_diff.pt`, row l is a difference of means of
`hidden_states[l]`, so it is our layer l - 1, and row 0 (the embeddings) is dropped; its authors also steer block l -
1 with row l. Other scripts stack the outputs of the blocks, where row l is our layer l. The file does not say which:
it is read as the former and its metadata keeps the number of rows, so that it fits only models with one layer less
(`SteeringVector.rows`), unless the first row is given. A row of zeros stands for a missing layer. The last row is
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

SUMMARY = ".pt stack of rows by layer, [layers + 1, hidden] as of Persona Vectors or [layers, hidden]"
SUFFIXES = ()


def reads(path: Path) -> bool:
    """Whether the file holds one tensor of two dimensions, or a list of tensors of one, with more than one row."""
    return _stack(path) is not None


def read(path: Path) -> SteeringVector:
    """Read a stack whose first row is not given (`read_stack`). Raises ArtifactError."""
    return read_stack(path, None)


def read_stack(path: Path, first_row: str | None) -> SteeringVector:
    """Read a stack of any float dtype. Warns that the base is unverified. Raises ArtifactError.

    `first_row` is `embeddings` or `block-0`; if it is None, the file is read as one of Persona Vectors, and fits only a
    model with one layer less than it has rows.
    """
    stack = _stack(path)
    if stack is None:
        raise ArtifactError(f"{path} does not hold a stack of rows by layer", AGAIN)
    skipped = 0 if first_row == "block-0" else 1
    parts = list(dense(path, "the stack", stack)) if isinstance(stack, Tensor) else stack
    rows = {i: direction(path, f"row {i + skipped}", row) for i, row in enumerate(parts[skipped:])}
    layers = {i: row for i, row in rows.items() if bool(row.any())}
    if not layers:
        raise ArtifactError(f"{path} holds only zeros", AGAIN)
    if first_row is not None:
        return imported(path, layers, "persona_vectors", first_row=first_row)
    return imported(path, layers, "persona_vectors", rows=len(parts))


def _stack(path: Path) -> Tensor | list[Tensor] | None:
    value = _pt.load(path)
    if isinstance(value, Tensor):
        return value if value.ndim == 2 and value.shape[0] > 1 else None
    several = isinstance(value, list) and len(value) > 1
    return value if several and all(isinstance(row, Tensor) and row.ndim == 1 for row in value) else None


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
