"""Direct preference optimisation: makes the preferred completion of each pair more likely, relative to the base.

loss = -log sigmoid(beta ((log p(y+) - log p_base(y+)) - (log p(y-) - log p_base(y-)))), equation 7 of the paper. A
sample's `other` is the rejected completion; `likelihood` is log p_base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steer.training.data.samples import Sample
from steer.training.objectives import divergence
from steer.training.objectives.protocol import ObjectiveSettings

SUMMARY = "prefer one completion of each pair to the other"
SOURCE = "Rafailov et al. 2023, arXiv:2305.18290"


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Pairs in rows 2i (preferred) and 2i + 1 (rejected); replay samples, which are unpaired, in the rows after.

    Adds to the batch of divergence.collate `likelihood` [2 pairs]: the base's log-likelihoods, in nats.
    """
    pairs = [
        side for sample in samples for side in (sample, sample.other) if sample.other is not None and side is not None
    ]
    single = [sample for sample in samples if sample.other is None]
    batch = divergence.collate([*pairs, *single], pad)
    batch["likelihood"] = torch.tensor([sample.likelihood for sample in pairs])
    return batch


def loss(batch: Mapping[str, Tensor], logits: Tensor, settings: ObjectiveSettings) -> Tensor:
    """The mean over the batch: of pairs the preference loss, of replay samples the divergence from the base in nats.

    `logits` are [count, vocabulary], as divergence.loss takes them.
    """
    total = divergence.summed(batch, logits)
    paired = len(batch["likelihood"])
    log_ratios = -total[:paired] - batch["likelihood"]
    margins = log_ratios[0::2] - log_ratios[1::2]
    replay = total[paired:] / batch["counts"][paired:].sum(1)
    return torch.cat([-torch.nn.functional.logsigmoid(settings.beta * margins), replay]).mean()
