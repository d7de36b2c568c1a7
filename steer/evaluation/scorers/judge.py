"""A language model that rates concept, instruction and fluency: the harmonic mean of three ratings from 0 to 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.evaluation.judging.client import Reply, ask
from steer.evaluation.judging.endpoint import endpoint
from steer.evaluation.judging.pairs import Pair, Preference, prefer
from steer.evaluation.judging.ratings import ASPECTS, Rated, question, rating
from steer.evaluation.scorers._protocol import GeneratedText, Resources, Scored
from vectors.registry.options import option
from vectors.storage.files import digest_file

SUMMARY = "ratings of an OpenAI-compatible judge: harmonic mean of concept, instruction and fluency"
SOURCE = "Wu et al. 2025 (AxBench), arXiv:2501.17148"
UNIT = "points of 2"
GRADED = True
UNREADABLE = "the judge gave no rating"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The judge, and the concept that it is asked about."""

    judge: str = option(help="The URL of an OpenAI-compatible server, or a YAML file with url, model and key_file.")
    concept: str = option(help="The behaviour, in words: a warm, friendly tone.")
    model: str | None = option(None, help="The model there, where the file does not name it.")
    pairwise: bool = option(True, help="Also ask which of two responses is better, the base's or the arm's.")
    key_file: Path | None = option(None, help="A file with the API key; by default STEER_JUDGE_KEY is sent, if set.")


def preferences(
    settings: Settings, first: Sequence[GeneratedText], second: Sequence[GeneratedText], resources: Resources
) -> list[Preference]:
    """Whether the judge prefers the first or the second response to each prompt, asked in both orders."""
    judge = endpoint(settings.judge, model=settings.model, key_file=settings.key_file)
    pairs = [Pair(a.prompt, a.response, b.response) for a, b in zip(first, second, strict=True)]
    return prefer(judge, settings.concept, pairs, resources.on_event)


def problems_of(settings: Settings) -> list[str]:
    """Why the judge can't be asked. Raises UsageError too. Nothing is sent."""
    endpoint(settings.judge, model=settings.model, key_file=settings.key_file)
    return [] if settings.concept.strip() else ["concept is empty"]


def inputs_of(settings: Settings) -> dict[str, str]:
    """The digest of the judge's file, never of its key."""
    file = Path(settings.judge)
    return {} if settings.judge.startswith(("http://", "https://")) else {str(file): digest_file(file)}


def score(settings: Settings, texts: Sequence[GeneratedText], resources: Resources) -> list[Scored]:
    """The harmonic mean of the ratings, which are the evidence; the decision is the rating of the concept.

    A rating without an answer, or in an answer that holds none, makes the score missing.
    """
    judge = endpoint(settings.judge, model=settings.model, key_file=settings.key_file)
    prompts = [
        question(aspect, concept=settings.concept, instruction=text.prompt, response=text.response)
        for text in texts
        for aspect in ASPECTS
    ]
    replies = ask(judge, prompts, resources.on_event)
    return [_scored(replies[i * len(ASPECTS) : (i + 1) * len(ASPECTS)]) for i in range(len(texts))]


def _scored(replies: Sequence[Reply]) -> Scored:
    """The score of one text from the three answers."""
    rated = Rated(*(None if reply.text is None else rating(reply.text) for reply in replies))
    evidence: dict[str, Any] = rated._asdict()
    problem = next((reply.problem for reply in replies if reply.text is None), "")
    if rated.combined is None:
        unread = [
            aspect for aspect, value, reply in zip(ASPECTS, rated, replies, strict=True) if value is None and reply.text
        ]
        evidence["unreadable"] = {aspect: (replies[ASPECTS.index(aspect)].text or "")[:200] for aspect in unread}
    return Scored(rated.combined, rated.concept, evidence, "" if rated.combined is not None else problem or UNREADABLE)
