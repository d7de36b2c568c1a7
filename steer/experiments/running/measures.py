"""What the server computes of the text of an answer: whether it refuses, and how much it repeats itself."""

from __future__ import annotations

import re

LONGEST = 20_000  # characters that are read
_PHRASES = (
    r"I'?m sorry,? (?:but )?I (?:can'?t|cannot|am unable)",
    r"I (?:can'?t|cannot|won'?t) (?:help|assist|provide|do that|comply|fulfill|answer|discuss|engage|create|generate)",
    r"(?:I'?m|I am) (?:unable|not able) to",
    r"as an AI(?: language)? model",
    r"I must decline",
    r"against my (?:guidelines|programming)",
)
_REFUSAL = re.compile(rf"\b(?:{'|'.join(_PHRASES)})".replace("'?", "['’]?"), re.IGNORECASE)
_BEGINNING = 400  # characters in which a refusal stands
# Every phrase has one of these; looking for them takes a tenth of the time of the pattern.
_MARKS = ("sorry", "i can", "i won", "able to", "as an ai", "i must", "against my")


def refuses(text: str) -> bool:
    """Whether an answer begins as refusals do. A list of phrases in English: a guardrail, not a measurement."""
    beginning = text[:_BEGINNING]
    if beginning.isascii():  # of other letters, some are taken for English ones in lower case
        lower = beginning.lower()
        if not any(mark in lower for mark in _MARKS):
            return False
    return matches(text)


def matches(text: str) -> bool:
    """`refuses`, by the pattern."""
    return _REFUSAL.search(text, 0, _BEGINNING) is not None


def repetition(text: str) -> float:
    """The share of the 4-grams of words that occurred before in the answer; 0 with fewer than four words.

    After seq-rep-4 of Welleck et al. 2019 (arXiv:1908.04319), of words, since the server sees no tokens.
    """
    words = text[:LONGEST].split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
