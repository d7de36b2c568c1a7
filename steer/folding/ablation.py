"""Ablation in the weights: the matrices that write to the residual stream are made orthogonal to the directions.

W becomes (I - sum_k s_k u_k u_k^T) W (Arditi et al. 2024, arXiv:2406.11717, section 4.1); an embedding row by row.
If a norm with weight w follows W, then <u, w * y> must be zero for the normalised output y of W. So W is made
orthogonal to w * u instead, which works for any divisor of the norm.

An output head that is tied to the embedding is untied first: it reads the stream, and must not change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from merges.engine.jobs import Copy
from merges.engine.readers import Dense
from merges.engine.tensor_task import Block, Computation, Input, TensorTask
from steer.folding.architectures import stream_is_last, writers
from steer.folding.effects import Effects
from steer.folding.pending import PendingModel
from vectors.architectures import Checkpoint


def refusal(effects: Effects, described: Checkpoint) -> str | None:
    """Why this architecture can't carry the ablation, or None."""
    if described.whole is not None:
        return f"images write to the stream of {described.whole} too, through weights that are not edited"
    if described.norms and bool((effects.strengths != 1).any()):
        return "a norm follows each write, so a direction can only be removed completely: ablate it with strength 1"
    return None


def edit(pending: PendingModel, effects: Effects, described: Checkpoint) -> PendingModel:
    """Orthogonalise every writer up to the last ablated layer, and untie the head."""
    norms = writers(described, pending.jobs, range(effects.last + 1))
    jobs: dict[str, Any] = {}
    for name, norm in norms.items():
        job = pending.jobs[name]
        assert isinstance(job, Copy)
        directions = effects.directions.numpy()
        strengths: np.ndarray | None = effects.strengths.numpy()
        if norm is not None:
            directions, strengths = through_norm(directions, pending.read(norm) + float(described.plus_one)), None
        # A bias, or the biases of experts: small, so float32 as for additions, which may follow on the same tensor.
        if len(job.shape) == 1 or name.endswith("bias"):
            scale = np.ones(len(directions)) if strengths is None else strengths
            bias = pending.read(name).astype(np.float64)
            jobs[name] = pending.constant(name, bias - ((bias @ directions.T) * scale) @ directions)
        else:
            jobs[name] = _orthogonalised(pending, job, directions, strengths, stream_is_last(described, name))
    if not pending.config.get("tie_word_embeddings", described.head not in pending.jobs):
        return pending.with_changes(jobs)
    embedding = pending.jobs[described.embeddings[0]]
    assert isinstance(embedding, Copy)
    head = Copy(described.head, embedding.entry)
    return pending.with_changes({**jobs, described.head: head}, tie_word_embeddings=False)


def through_norm(directions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The orthonormal directions [k, hidden] that a write must avoid before its norm multiplies by `weight`."""
    basis, _ = np.linalg.qr((directions * weight.astype(np.float64)).T)
    return np.ascontiguousarray(basis.T)


def _orthogonalised(
    pending: PendingModel, job: Copy, directions: np.ndarray, strengths: np.ndarray | None, stream_is_last: bool
) -> TensorTask:
    """The engine's job for one matrix. With `strengths` None the directions are removed completely.

    The stream is the last dimension of the matrix, or else the first of two.
    """
    scale = np.ones(len(directions)) if strengths is None else strengths
    if stream_is_last:

        def by_row(_tensor: TensorTask, block: Block, _prepared: Any) -> np.ndarray:
            rows = block.values[0].reshape(-1, directions.shape[1]).astype(np.float64)
            return rows - ((rows @ directions.T) * scale) @ directions

        method = Computation(space="weight", unit="row", combine=by_row)
    else:
        width = job.shape[1]

        def prepare(tensor: TensorTask) -> np.ndarray:
            """U W, [k, columns] float64, summed over pieces in their order."""

            def part(block: Block) -> np.ndarray:
                rows = block.values[0].reshape(-1, width).astype(np.float64)
                first = block.start // width
                return directions[:, first : first + len(rows)] @ rows

            return tensor.sum(part)

        def by_column(_tensor: TensorTask, block: Block, products: np.ndarray) -> np.ndarray:
            rows = block.values[0].reshape(-1, width).astype(np.float64)
            first = block.start // width
            along = directions[:, first : first + len(rows)]
            return rows - (along.T * scale) @ products

        method = Computation(space="weight", unit="row", prepare=prepare, combine=by_column)
    source = Input(job.name, Dense(job.entry), False)
    return TensorTask(job.name, job.shape, job.dtype, (source,), None, method, pending.pool)


def hook(effects: Effects, norm: torch.Tensor | None) -> Any:
    """A forward hook that changes a writer's output as `edit` changes its weights; the reference of the proof."""
    if norm is None:
        directions, strengths = effects.directions, effects.strengths
    else:
        directions = torch.from_numpy(through_norm(effects.directions.numpy(), norm.double().cpu().numpy()))
        strengths = torch.ones(len(directions), dtype=torch.float64)

    def call(_module: Any, _inputs: Any, output: Any) -> Any:
        written = output if isinstance(output, torch.Tensor) else output[0]
        wide = written.double()
        along = directions.to(wide.device)
        wide = wide - ((wide @ along.T) * strengths.to(wide.device)) @ along
        moved = wide.to(written.dtype)
        return moved if isinstance(output, torch.Tensor) else (moved, *output[1:])

    return call
