"""Fitting a readout at one layer, and what it is worth on examples that it was not fitted to.

Each fold is scored by the readout of the other folds. A readout's scores are made log-odds by a map that is fitted to
held-out scores: for the figures, to those of the other folds, so that no example has a part in its own figure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probes.directions.evidence import Evidence, Rows, evidence_of, evidence_of_others, piece, pieces
from probes.readouts.calibration import Scale, platt
from probes.readouts.methods import ReadoutMethod
from probes.readouts.scoring import Pool
from vectors.probe import Readout


class Fitted(NamedTuple):
    """A readout of one layer, and its log-odds of every text while that was held out, float64 [texts]; NaN without."""

    readout: Readout
    held_out: Tensor


class Units(NamedTuple):
    """What the rows of one layer are: `owner` int64 [rows] is the text of each row, and `last` its last row of each.

    `labels` bool [texts] and `fold` int64 [texts] are of the texts.
    """

    owner: Tensor
    labels: Tensor
    fold: Tensor

    def pooled(self, scores: Tensor, pool: Pool) -> Tensor:
        """One score for each text, float64 [texts], from those of its rows, which stand in their order."""
        texts = len(self.labels)
        if pool == "max":
            start = torch.full((texts,), -torch.inf, dtype=scores.dtype)
            return start.scatter_reduce(0, self.owner, scores, "amax")
        if pool == "last":
            last = torch.zeros(texts, dtype=torch.int64)
            last.scatter_reduce_(0, self.owner, torch.arange(len(self.owner)), "amax")
            return scores[last]
        sums = torch.zeros(texts, dtype=scores.dtype).index_add_(0, self.owner, scores)
        return sums / torch.bincount(self.owner, minlength=texts)


def fit(method: ReadoutMethod, rows: Rows, units: Units, pool: Pool = "mean") -> Fitted | None:
    """Fit a method to rows [n, hidden] of one layer; None where they do not tell the classes apart at all.

    A weight of float32 [hidden] and a bias, calibrated to log-odds of the texts' pooled scores.
    """
    labels, fold = units.labels[units.owner], units.fold[units.owner]
    if method.NEEDS == "activations":
        rows = piece(rows, 0, len(labels))  # once, for all folds
    weight, bias = method.readout(evidence_of(method.NEEDS, rows, labels, paired=False))
    if not bool(torch.isfinite(weight).all()) or float(weight.norm()) == 0.0:
        return None
    folds = int(units.fold.max()) + 1
    if folds == 1:  # one example of a class can't be held out
        scale = platt(units.pooled(_scores(rows, [(weight, bias)], torch.zeros_like(fold)), pool), units.labels)
        held_out = torch.full((len(units.labels),), torch.nan, dtype=torch.float64)
    else:
        others = evidence_of_others(method.NEEDS, rows, labels, fold, paired=False)
        raw = units.pooled(_scores(rows, [_readout(method, each) for each in others], fold), pool)
        scale = platt(raw, units.labels)
        held_out = torch.empty_like(raw)
        for f in range(folds):
            inside = units.fold == f
            held_out[inside] = platt(raw[~inside], units.labels[~inside]).apply(raw[inside])
    return Fitted(scaled(weight, bias, scale), held_out)


def scaled(weight: Tensor, bias: Tensor, scale: Scale) -> Readout:
    """A readout with its scale folded into weight and bias."""
    return Readout((weight * scale.slope).float(), float(bias) * scale.slope + scale.offset)


def _readout(method: ReadoutMethod, evidence: Evidence) -> tuple[Tensor, Tensor]:
    weight, bias = method.readout(evidence)
    if not bool(torch.isfinite(weight).all()):
        return torch.zeros_like(weight), torch.zeros_like(bias)
    return weight, bias


def _scores(rows: Rows, readouts: list[tuple[Tensor, Tensor]], which: Tensor) -> Tensor:
    """The score of each row by the readout that `which` int64 [rows] names, float64 [rows]."""
    weights = torch.stack([weight for weight, _ in readouts])
    biases = torch.stack([bias for _, bias in readouts])
    scores = torch.empty(len(which), dtype=torch.float64)
    for start, stop in pieces(len(which), rows.shape[1]):
        part = which[start:stop]
        products = piece(rows, start, stop) @ weights.T
        scores[start:stop] = products.gather(1, part[:, None])[:, 0] + biases[part]
    return scores
