"""Two models on the same tokens: how far their predictions lie apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.models.tokens import rendered

Within = Callable[
    [Sequence[int]], AbstractContextManager[None]
]  # from the rows' prompt lengths to their pass's context
BATCH = 8


class Row(NamedTuple):
    """The ids of one prompt and its response, and how many belong to the prompt."""

    ids: list[int]
    prompt: int

    @property
    def said(self) -> list[int]:
        """The ids of the response."""
        return self.ids[self.prompt :]


class Difference(NamedTuple):
    """Over all tokens: the greatest |difference of logits|, the mean and the greatest KL divergence in nats."""

    max_logit: float
    kl_mean: float
    kl_max: float
    tokens: int


def plain(_prompts: Sequence[int]) -> AbstractContextManager[None]:
    """The model as it is."""
    return nullcontext()


def rows_of(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, within: Within = plain) -> list[Row]:
    """Each prompt as the model is asked it, and its own greedy response of so many tokens under `within`."""
    found = []
    for ids in rendered(prompts, tokenizer):
        given = torch.tensor([ids], device=_device(model))
        if not tokens:
            found.append(Row(ids, len(ids)))
            continue
        with within([len(ids)]), torch.inference_mode():
            output = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        found.append(Row(output[0].tolist(), len(ids)))
    return found


def logits_of(model: Any, row: Row, within: Within = plain) -> Tensor:
    """The logits of every token of a row, float32 [tokens, vocabulary] on the CPU."""
    with within([row.prompt]), torch.inference_mode():
        ids = torch.tensor([row.ids], device=_device(model))
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def completions(model: Any, rows: Sequence[Row], within: Within = plain) -> Iterator[tuple[int, Tensor]]:
    """By row, in no order: its place, and the logits before each token of its completion, [completion, vocabulary].

    Rows of like length share a pass, since at this size a pass costs little more than reading the weights once.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    device = _device(model)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = [rows[i] for i in places]
        longest = max(len(row.ids) for row in batch)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in batch], device=device)
        mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch], device=device)
        first = min(row.prompt for row in batch) - 1
        keep = torch.arange(first, longest - 1, device=device)
        with within([row.prompt for row in batch]), torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        for place, row, own in zip(places, batch, logits, strict=True):
            # Out of inference mode: what is kept may be needed for a backward pass.
            yield place, own[row.prompt - 1 - first : len(row.ids) - 1 - first].float().cpu().clone()


def scores_of(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token of `ids` in nats, from the logits before each, [tokens, vocabulary]."""
    logs = logits.double().log_softmax(-1)
    return [float(score) for score in logs.gather(1, torch.tensor(ids)[:, None])[:, 0]]


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of each token in nats, [tokens] float64, from logits [tokens, vocabulary]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def difference(references: Sequence[Tensor], others: Sequence[Tensor]) -> Difference:
    """How far two models' logits lie apart, row by row."""
    kl = torch.cat([divergence(a, b) for a, b in zip(references, others, strict=True)])
    most = torch.stack([(a - b).abs().max() for a, b in zip(references, others, strict=True)]).max()
    return Difference(float(most), float(kl.mean()), float(kl.max()), len(kl))


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
