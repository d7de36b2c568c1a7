"""The markers of a response's sections as people write them: what begins and ends thinking, or calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vectors.errors import UsageError

KINDS = ("thinking", "tools")
FLAG = "--steer-markers"

# The option of every command that runs a model.
OPTION: dict[str, Any] = {
    "help": "The texts with which the model begins and ends its thinking, or its calls of tools, for @answer, "
    "@thinking and @outside-tools: thinking='<think>,</think>', tools='<call>,</call>'; may be given for both.",
    "metavar": "KIND=BEGIN,END",
    "flag": FLAG,
    "default_text": "those of the known forms that are tokens of the model",
}


def markers_in(texts: Sequence[str]) -> dict[str, list[str]]:
    """The beginning and the end of each kind, "" for none. Raises UsageError."""
    markers: dict[str, list[str]] = {}
    for text in texts:
        kind, _, pair = text.partition("=")
        begin, _, end = pair.partition(",")
        if kind not in KINDS or not begin:
            raise UsageError(f"{FLAG} {text!r} is not thinking or tools with two texts", f"{FLAG} thinking=BEGIN,END")
        if kind in markers:
            raise UsageError(f"{FLAG} gives {kind} twice", "one pair of texts for each kind")
        markers[kind] = [begin, end]
    return markers
