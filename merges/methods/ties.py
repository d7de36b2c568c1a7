"""TIES: trim each delta to its greatest magnitudes, elect a sign for each element, average the values that
agree with it.

The paper (algorithm 1) trims over the whole model (`scope: global`); most tools trim each tensor by itself. The paper
has no weights: here signs are elected before weighting, or after it with `elect: after`; a negative weight adds the
negated vector. Where votes cancel, the result is zero, as sgn(0) = 0 in the paper; `zero: positive` is mergekit's.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.steps import disjoint_mean, elect_signs, trim
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining, _trimming
from merges.methods._options import COMBINE, ELECT, SCALE, ZERO, density, weight


def ties(deltas: np.ndarray, density: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """TIES-Merging (Yadav et al. 2023, arXiv:2306.01708, algorithm 1), as the engine computes it in pieces.

    `deltas` [inputs, ...] float32 are the fine-tunes minus their base; `density` and `weights` [inputs] float64.
    Returns the merged delta, float64, to be multiplied by lambda and added to the base.
    """
    trimmed = [trim(delta, *_trimming.limits_of(delta, share)) for delta, share in zip(deltas, density, strict=True)]
    signs = elect_signs(trimmed, votes=np.sign(weights))
    return disjoint_mean(trimmed, weights, signs)


def elementwise(task: TensorTask, trimming: _trimming.Trimming) -> Elementwise:
    """The method as a formula for the compiled pass, given the limits of the trimming."""
    return _combining.disjoint_mean(task, **trimming._asdict())


METHOD = MergeMethod(
    name="ties",
    summary="trim each delta, elect a sign for each element, average the values that agree",
    source="Yadav et al. 2023, arXiv:2306.01708, algorithm 1",
    options=(weight(), density(), SCALE, ELECT, COMBINE, ZERO, _trimming.RESCALE),
    space="delta",
    base="needed",
    global_scope=True,
    prepare=_trimming.prepare,
    elementwise=elementwise,
)
