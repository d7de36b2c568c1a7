"""The contract of a scorer: a module with these names, here or named by a `steer.scorers` entry point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vectors.events import OnEvent, ignore


class GeneratedText(NamedTuple):
    """What a model wrote in answer to a prompt, as texts without special tokens."""

    prompt: str
    response: str


class Scored(NamedTuple):
    """The score of one text, or why it is missing.

    `value` is what rates and means are taken of; None where it is missing, and then `reason` says why in words that
    are the same for the same cause, so that causes can be counted. `decision` is what is compared with hand labels: 0
    for no and 1 for yes, or 0 to 2. `evidence` is what the value rests on, as a JSON value.
    """

    value: float | None
    decision: int | None = None
    evidence: Any = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What an evaluation lends a scorer: the unsteered model (a `LoadedModel`), and where progress is reported.

    `loaded` is None where no model is loaded. `seed` is the evaluation's. `kept` is what a scorer keeps from one call
    to the next with the same resources, such as a classifier that it has loaded.
    """

    loaded: Any = None
    device: str = "auto"
    seed: int = 0
    on_event: OnEvent = ignore
    kept: dict[Any, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """What a scorer's file must define.

    `Settings` is a frozen, keyword-only dataclass; its fields are made by `vectors.registry.options.option`, are texts,
    numbers, switches, paths or tuples of texts, and may be named in a suite. The first one may be given alone.
    """

    SUMMARY: str  # one line: what it is
    SOURCE: str  # where it comes from: a paper, or "" for common knowledge
    UNIT: str  # of the value: "share of texts", "points of 2"
    GRADED: bool  # whether decisions are of three levels, 0 to 2; else they are 0 and 1
    Settings: type

    def problems_of(self, settings: Any) -> list[str]:
        """What is wrong with the settings beyond their types and ranges; nothing heavy is loaded for it."""

    def inputs_of(self, settings: Any) -> dict[str, str]:
        """The digests of the files that the settings name, by path, for the run's record."""

    def score(self, settings: Any, texts: Sequence[GeneratedText], resources: Resources) -> list[Scored]:
        """The score of each text, in order."""
