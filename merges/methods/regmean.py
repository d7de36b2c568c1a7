"""RegMean: the matrix whose outputs are closest to those of each model on its inputs, in closed form.

`gram` of each input is the path of a safetensors file with X^T X ([in, in]) of the inputs X of each matrix, under the
parameter's name. With G' = a G + (1 - a) diag(G) the result is (sum W_i G'_i) (sum G'_i)^-1. A parameter without
an entry in the files is averaged.
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod, Statistic
from merges.engine.readers import read_whole
from merges.engine.tensor_task import Block, TensorTask
from vectors.registry.options import Option


def statistic_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the inner products: [in, in] for a matrix [out, in]; None for any other parameter."""
    return (shape[1], shape[1]) if len(shape) == 2 else None


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """The closed-form solution, or the average for a parameter without inner products."""
    values = block.values.reshape(len(block.values), *task.shape).astype(np.float64)
    readers = task.statistics["gram"]
    if not readers:
        return values.mean(0)
    grams = [read_whole(reader).astype(np.float64) for reader in readers]
    alpha = task.options["alpha"]
    grams = [alpha * gram + (1 - alpha) * np.diag(np.diag(gram)) for gram in grams]
    left = sum(value @ gram for value, gram in zip(values, grams, strict=True))
    # Least squares, since constant inputs make the sum singular; then the solution closest to the average is taken.
    average = values.mean(0)
    total = np.sum(grams, 0)
    return average + np.linalg.lstsq(total.T, (left - average @ total).T, rcond=None)[0].T


METHOD = MergeMethod(
    name="regmean",
    summary="the matrix whose outputs are closest to those of every model",
    source="Jin et al. 2023, arXiv:2212.09849, equation 2",
    options=(Option("alpha", 0.9, "a factor of the inner products off the diagonal", low=0, high=1),),
    space="weight",
    base="unused",
    unit="tensor",
    statistics=(Statistic("gram", statistic_shape, required=False),),
    combine=combine,
)
