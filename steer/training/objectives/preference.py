"""Direct preference optimisation: the preferred completion of each pair more likely than the other, against the base.

loss = -log sigmoid(beta ((log p(y+) - log p_base(y+)) - (log p(y-) - log p_base(y-)))), equation 7 of the paper. A
sample's `other` is the less wanted completion; `likelihood` is log p_base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steer.training.data.samples import Sample
from steer.training.objectives import divergence
from steer.training.objectives.protocol import ObjectiveSettings

SUMMARY = "prefer one completion to another"
SOURCE = "Rafailov et al. 2023, arXiv:2305.18290"


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """The pairs one after another: rows 2i and 2i + 1 belong together. Replay samples stand alone, after them."""
    pairs = [
        one for sample in samples for one in (sample, sample.other) if sample.other is not None and one is not None
    ]
    single = [sample for sample in samples if sample.other is None]
    batch = divergence.collate([*pairs, *single], pad)
    batch["likelihood"] = torch.tensor([sample.likelihood for sample in pairs])
    return batch


def loss(batch: Mapping[str, Tensor], logits: Tensor, settings: ObjectiveSettings) -> Tensor:
    """The mean over pairs, and over replay samples their divergence from the base."""
    total = divergence.summed(batch, logits)
    paired = len(batch["likelihood"])
    gained = -total[:paired] - batch["likelihood"]
    margins = gained[0::2] - gained[1::2]
    replay = total[paired:] / batch["counts"][paired:].sum(1)
    return torch.cat([-torch.nn.functional.logsigmoid(settings.beta * margins), replay]).mean()
