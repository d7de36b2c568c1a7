"""Whether a text matches a regular expression anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steer.evaluation.scorers._protocol import GeneratedText, Resources, Scored
from vectors.registry.options import option

SUMMARY = "share of responses in which a regular expression matches"
SOURCE = ""
UNIT = "share of texts"
GRADED = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The expression, in Python's syntax."""

    pattern: str = option(help="The regular expression; it may match anywhere in the response.")
    ignore_case: bool = option(True, help="Take capital and small letters as the same.")


def problems_of(settings: Settings) -> list[str]:
    """Why the pattern can't be compiled."""
    try:
        re.compile(settings.pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"the pattern {settings.pattern[:80]!r} is not a regular expression: {error}"]
    return []


def inputs_of(_settings: Settings) -> dict[str, str]:
    """It reads no file."""
    return {}


def score(settings: Settings, texts: Sequence[GeneratedText], _resources: Resources) -> list[Scored]:
    """1 where the pattern matches, with the first match as evidence."""
    pattern = re.compile(settings.pattern, re.IGNORECASE if settings.ignore_case else 0)
    scored = []
    for text in texts:
        match = pattern.search(text.response)
        scored.append(Scored(float(match is not None), int(match is not None), match[0][:200] if match else None))
    return scored
