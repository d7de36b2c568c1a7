"""Which of two texts shows a concept better: asked in both orders, and an abstention where the order decides.

Judges prefer a position (Zheng et al. 2023, arXiv:2306.05685, section 3.4): an answer counts only if it stays the same
when the two texts change places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from steer.evaluation.judging.client import ask
from steer.evaluation.judging.endpoint import Endpoint
from steer.evaluation.judging.ratings import block, without_reasoning
from vectors.events import OnEvent, ignore

_CHOICE = re.compile(r"better\W{0,5}\[\[\s*([^\]\n]{0,20}?)\s*\]\]", re.IGNORECASE)
_QUESTION = """Two responses to the same instruction follow. Decide which of them shows the concept more clearly
while it still answers the instruction in fluent language. Their order and their length do not matter.

{concept}{instruction}{first}{second}Compare them in two or three sentences. End with the decision alone on
the last line, in exactly one of these forms: "Better: [[1]]", "Better: [[2]]", or "Better: [[tie]]"."""  # fmt: skip


class Pair(NamedTuple):
    """Two responses to one instruction."""

    instruction: str
    first: str
    second: str


class Preference(NamedTuple):
    """1 if the first of a pair is better, -1 if the second is, 0 for a tie; None, with the reason, without a decision.

    The reason is "order" where the decision changed with the order, "unreadable", or why there was no answer.
    """

    value: int | None
    reason: str = ""


def prefer(endpoint: Endpoint, concept: str, pairs: Sequence[Pair], on_event: OnEvent = ignore) -> list[Preference]:
    """The judge's preference in each pair, from two questions: both orders."""
    prompts = [
        _question(concept, pair.instruction, *texts)
        for pair in pairs
        for texts in ((pair.first, pair.second), (pair.second, pair.first))
    ]
    replies = ask(endpoint, prompts, on_event, stage="judging pairs")
    preferences = []
    for index in range(len(pairs)):
        both = replies[2 * index : 2 * index + 2]
        problem = next((reply.problem for reply in both if reply.text is None), "")
        forward, backward = (None if reply.text is None else choice(reply.text) for reply in both)
        if problem:
            preferences.append(Preference(None, problem))
        elif forward is None or backward is None:
            preferences.append(Preference(None, "unreadable"))
        elif forward == -backward:
            preferences.append(Preference(forward))
        else:
            preferences.append(Preference(None, "order"))
    return preferences


def choice(answer: str) -> int | None:
    """The decision in an answer: 1 for the first text, -1 for the second, 0 for a tie; None where there is none."""
    found = _CHOICE.findall(without_reasoning(answer))
    return {"1": 1, "2": -1, "tie": 0}.get(found[-1].lower()) if found else None


def _question(concept: str, instruction: str, first: str, second: str) -> str:
    return _QUESTION.format(
        concept=block("concept", concept),
        instruction=block("instruction", instruction),
        first=block("response 1", first),
        second=block("response 2", second),
    )
