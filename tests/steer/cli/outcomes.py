"""What the tests of commands share: the outcome of a command, and the form of its errors."""

from __future__ import annotations

Outcome = tuple[int, str, str]


WARM = ["you are dear to me", "what a lovely day friend", "I am so glad for you", "take good care of you"] * 3


COLD = ["the form is incomplete", "submit the document now", "no further reply follows", "the request is denied"] * 3


def error_of(outcome: Outcome, code: int = 1) -> str:
    """The error lines of a failed command; checks the form that every failure has."""
    assert outcome[0] == code, outcome
    assert outcome[1] == ""
    assert "Traceback" not in outcome[2]
    *_, message = outcome[2].partition("error: ")
    problems, empty, hint = message.partition("\n\nhint: ")
    assert empty, outcome[2]
    assert hint.strip()
    return problems
