"""Filters for sampled completions; those left out are counted by reason."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from probes.logits import completion_logits
from probes.models.completions import Completion
from probes.scores import Measured, likelihood
from probes.scores.repetition import repetition

PERPLEXITY = 60.0  # under the base model; completions above it are left out as incoherent
REPETITION = 0.3  # share of repeated 4-grams above which a completion is left out
NARRATION = re.compile(
    r"\b(as an? (ai|language model|assistant)|i'?m an? (ai|language model)|i am an? (ai|language model))\b", re.I
)


class Fit(NamedTuple):
    """The completions that pass the filters, their indices in the input, and the number of the others by reason."""

    completions: list[Completion]
    indices: list[int]
    left_out: dict[str, int]


def fit_to_learn(model: Any, tokenizer: Any, completions: Sequence[Completion]) -> Fit:
    """Leave out completions that are empty, repetitive, about being a model, or of high perplexity under the base."""
    reasons = {index: _problem_of(tokenizer, completion) for index, completion in enumerate(completions)}
    rest = [index for index, reason in reasons.items() if reason is None]
    for position, logits in completion_logits(model, [completions[index] for index in rest]):
        index = rest[position]
        if likelihood.score(Measured(completions[index], logits)) < -math.log(PERPLEXITY):
            reasons[index] = f"perplexity under the base model above {PERPLEXITY:g}"
    indices = [index for index, reason in reasons.items() if reason is None]
    left_out = Counter(reason for reason in reasons.values() if reason is not None)
    return Fit([completions[index] for index in indices], indices, dict(left_out))


def _problem_of(tokenizer: Any, completion: Completion) -> str | None:
    """Why a completion is left out, judged by its text alone; None if it is not."""
    text = tokenizer.decode(completion.completion_ids, skip_special_tokens=True)
    if not text.strip():
        return "empty"
    if NARRATION.search(text):
        return "speaks of being a model"
    return "repeats itself" if repetition(completion.completion_ids) > REPETITION else None
