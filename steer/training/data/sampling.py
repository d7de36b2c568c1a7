"""Completions to learn from: asked of the teacher and of the student, and the bad ones left out with the reason."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from probes.generation import SharedNoise
from probes.models.loading import memory_reported
from probes.scores.divergence import Row, completions, scores_of

BATCH = 64
PERPLEXITY = 60.0  # of the plain model, above which a completion is no text
REPEATED = 0.3  # of the 4-grams, above which it goes round in circles
NARRATION = re.compile(
    r"\b(as an? (ai|language model|assistant)|i'?m an? (ai|language model)|i am an? (ai|language model))\b", re.I
)

Batched = Callable[[], AbstractContextManager[None]]


class Kept(NamedTuple):
    """The rows that are fit to learn from, their places among those given, and how many were left out, by reason."""

    rows: list[Row]
    places: list[int]
    left_out: dict[str, int]


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], within: Batched = nullcontext, *, tokens: int,
    temperature: float, seed: int, names: Sequence[str], progress: Callable[[int], None] = lambda done: None,
) -> list[Row]:  # fmt: skip
    """One completion of each prompt (ids), up to `tokens` long and with its end token, under `within`.

    A prompt's noise follows from its name, so neither order nor batch changes a completion's chances.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = set(_ends(model, tokenizer))
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Row] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        chosen: dict[str, Any] = {}
        if temperature > 0:
            chosen["logits_processor"] = [SharedNoise([names[i] for i in batch], 1, temperature, seed)]
        with memory_reported(), within(), torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None, pad_token_id=pad, eos_token_id=sorted(ends) or None, **chosen,
            )  # fmt: skip
        for row, i in zip(output[:, longest:].tolist(), batch, strict=True):
            stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            found[i] = Row([*prompts[i], *row[:stop]], len(prompts[i]))
        progress(len(found))
    return [found[i] for i in range(len(prompts))]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return [token for token in [*listed, tokenizer.eos_token_id] if token is not None]


def fit_to_learn(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Kept:
    """Leave out what is empty, repeats itself, speaks of being a model, or is no text to the plain model."""
    reasons = {place: _bad_words(tokenizer, row) for place, row in enumerate(rows)}
    words = [place for place, reason in reasons.items() if reason is None]
    for at, logits in completions(model, [rows[place] for place in words]):
        scores = scores_of(logits, rows[words[at]].said)
        if sum(scores) / len(scores) < -math.log(PERPLEXITY):
            reasons[words[at]] = "is no text to the plain model"
    places = [place for place, reason in reasons.items() if reason is None]
    left_out = Counter(reason for reason in reasons.values() if reason is not None)
    return Kept([rows[place] for place in places], places, dict(left_out))


def _bad_words(tokenizer: Any, row: Row) -> str | None:
    """Why a completion is not fit to learn from, by its words alone."""
    text = tokenizer.decode(row.said, skip_special_tokens=True)
    if not text.strip():
        return "empty"
    if NARRATION.search(text):
        return "speaks of being a model"
    return "repeats itself" if repeated(row.said) > REPEATED else None


def repeated(ids: Sequence[int]) -> float:
    """The share of 4-grams that occurred before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
