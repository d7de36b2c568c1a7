"""Ablation in the weights: every matrix that writes to the residual stream no longer writes along the directions.

W becomes (I - sum_k s_k u_k u_k^T) W (Arditi et al. 2024, arXiv:2406.11717, section 4.1), for embeddings row by row.
Where a write passes through a norm with weight w, what must vanish is <u, w * y> for the normalised output y of W: W is
made orthogonal to w * u instead, which holds whatever the norm divides by.

An output head that is tied to the embedding is stored apart first: it reads the stream, and must stay as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from merges.engine.jobs import Copy
from merges.engine.readers import Dense
from merges.engine.tensor_task import Block, Computation, Input, TensorTask
from steer.folding.architectures import Layout, writers
from steer.folding.effects import Effects
from steer.folding.pending import PendingModel

HEAD = {"gpt_neox": "embed_out.weight"}


def refusal(effects: Effects, layout: Layout) -> str | None:
    """Why this architecture can't carry the ablation, or None."""
    if layout.norms and bool((effects.strengths != 1).any()):
        return "its writes are normalised, so a direction can only be removed whole: ablate it with strength 1"
    return None


def edit(pending: PendingModel, effects: Effects, layout: Layout) -> PendingModel:
    """Orthogonalise every writer up to the last ablated layer, and untie the head."""
    found = writers(layout, pending.jobs, range(effects.last + 1))
    jobs: dict[str, Any] = {}
    for name, norm in found.items():
        job = pending.jobs[name]
        assert isinstance(job, Copy)
        directions = effects.directions.numpy()
        strengths: np.ndarray | None = effects.strengths.numpy()
        if norm is not None:
            directions, strengths = through_norm(directions, pending.read(norm) + float(layout.plus_one)), None
        if len(job.shape) == 1:  # a bias: small, and float32 as those that additions make, so that it is exact
            scale = np.ones(len(directions)) if strengths is None else strengths
            own = pending.read(name).astype(np.float64)
            jobs[name] = pending.constant(name, own - ((own @ directions.T) * scale) @ directions)
        else:
            jobs[name] = _orthogonalised(pending, job, directions, strengths, layout)
    if not pending.config.get("tie_word_embeddings", _tied_by_default(pending)):
        return pending.with_changes(jobs)
    embedding = pending.jobs[layout.embeddings[0]]
    assert isinstance(embedding, Copy)
    head = HEAD.get(str(pending.config.get("model_type")), "lm_head.weight")
    return pending.with_changes({**jobs, head: Copy(head, embedding.entry)}, tie_word_embeddings=False)


def through_norm(directions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The orthonormal directions [k, hidden] that a write must avoid before its norm multiplies by `weight`."""
    basis, _ = np.linalg.qr((directions * weight.astype(np.float64)).T)
    return np.ascontiguousarray(basis.T)


def _tied_by_default(pending: PendingModel) -> bool:
    """Whether a model whose configuration does not say so has a tied head: it has no head of its own."""
    return not any(name in pending.jobs for name in ("lm_head.weight", "embed_out.weight"))


def _orthogonalised(
    pending: PendingModel, job: Copy, directions: np.ndarray, strengths: np.ndarray | None, layout: Layout
) -> TensorTask:
    """The job of one matrix. `strengths` None removes the directions whole."""
    rows_are_stream = job.name not in layout.embeddings and not layout.columns
    scale = np.ones(len(directions)) if strengths is None else strengths
    if not rows_are_stream:

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
            own = directions[:, first : first + len(rows)]
            return rows - (own.T * scale) @ products

        method = Computation(space="weight", unit="row", prepare=prepare, combine=by_column)
    source = Input(job.name, Dense(job.entry), False)
    return TensorTask(job.name, job.shape, job.dtype, (source,), None, method, pending.pool)


def hook(effects: Effects, norm: torch.Tensor | None) -> Any:
    """The forward hook that does to a writer's output what `edit` does to its weights; the reference of the proof."""
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
