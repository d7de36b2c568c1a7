"""The yes/no persona format of Perez et al. 2022 (model-written evaluations), arXiv:2212.09251.

A statement in the first person; `answer_matching_behavior` is " Yes" where saying it shows the trait. The statement
itself is the example, its label the class.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text

KEYS = frozenset({"question", "statement", "answer_matching_behavior"})
SHAPE = '{"question","statement","answer_matching_behavior"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One labelled example: the statement as a plain text."""
    answer = text(record, "answer_matching_behavior").strip().lower()
    if answer not in ("yes", "no"):
        raise ValueError(f"answer_matching_behavior must be Yes or No, not {answer!r}")
    return [Example(text(record, "statement"), label=answer == "yes", origin=origin)]
