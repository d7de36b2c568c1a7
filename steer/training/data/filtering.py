"""Which completions are fit to learn from: the others are left out, and counted by the reason."""

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

PERPLEXITY = 60.0  # under the base model, above which a completion is no text
REPETITION = 0.3  # the share of repeated 4-grams above which a completion goes round in circles
NARRATION = re.compile(
    r"\b(as an? (ai|language model|assistant)|i'?m an? (ai|language model)|i am an? (ai|language model))\b", re.I
)


class Fit(NamedTuple):
    """The completions that are fit to learn from, their indices among those given, and how many are not, by reason."""

    completions: list[Completion]
    indices: list[int]
    left_out: dict[str, int]


def fit_to_learn(model: Any, tokenizer: Any, completions: Sequence[Completion]) -> Fit:
    """Leave out what is empty, repeats itself, speaks of being a model, or has a high perplexity under the base."""
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
    """Why a completion is not fit to learn from, by its words alone."""
    text = tokenizer.decode(completion.completion_ids, skip_special_tokens=True)
    if not text.strip():
        return "empty"
    if NARRATION.search(text):
        return "speaks of being a model"
    return "repeats itself" if repetition(completion.completion_ids) > REPETITION else None
