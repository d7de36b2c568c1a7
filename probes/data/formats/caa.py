"""The A/B format of contrastive activation addition: a question with choices.

Source: Rimsky et al., ACL 2024, arXiv:2312.06681.

`question` holds the choices "(A) ..." and "(B) ..."; the answers are "(A)" and "(B)". That paper takes the activation
of the letter, `--tokens -2`.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text

KEYS = frozenset({"question", "answer_matching_behavior", "answer_not_matching_behavior"})
SHAPE = '{"question","answer_matching_behavior","answer_not_matching_behavior"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """The answer that matches the behaviour as the positive example, and the other as the negative."""
    question = text(record, "question")
    matching, other = text(record, "answer_matching_behavior"), text(record, "answer_not_matching_behavior")
    if matching.strip() == other.strip():
        raise ValueError(f"both answers are {matching.strip()!r}")
    return [
        Example(matching, question, label=True, pair=origin, origin=origin),
        Example(other, question, label=False, pair=origin, origin=origin),
    ]
