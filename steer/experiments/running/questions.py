"""What a judge behind an OpenAI-compatible endpoint is asked about an answer, and what its reply says."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from steer.evaluation.judging.client import ask
from steer.evaluation.judging.endpoint import Endpoint, require_sendable
from steer.evaluation.judging.ratings import block, without_reasoning
from steer.evaluation.scorers import GeneratedText, Scored
from steer.experiments.feedback import GREATEST
from steer.experiments.specification import Experiment, Judge, Metric
from vectors.errors import SteerError, collecting, raise_together
from vectors.events import OnEvent, ignore

_SCORE = re.compile(r"\[\[\s*([^\]\n]{1,20}?)\s*\]\]")
_WORDS = {"yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
_FORMAT = {
    "bool": 'End with "Answer: [[yes]]" or "Answer: [[no]]" alone on the last line.',
    "number": 'End with the score alone on the last line, in exactly this form: "Score: [[3]]".',
}


def scores_by(
    judge: Judge, metric: Metric, texts: Sequence[GeneratedText], on_event: OnEvent = ignore
) -> list[float | None]:
    """The judge's score of each text; None where there is none."""
    return [each.value for each in scored_by(judge, metric, texts, on_event)]


def scored_by(
    judge: Judge, metric: Metric, texts: Sequence[GeneratedText], on_event: OnEvent = ignore, *, attempts: int = 5,
    timeout: float = 120.0,
) -> list[Scored]:  # fmt: skip
    """The judge's score of each text, or why there is none. `timeout` is in seconds, for one request."""
    endpoint = Endpoint(
        url=judge.url.rstrip("/"), model=judge.model, key=key_of(judge), attempts=attempts, timeout=timeout
    )
    replies = ask(endpoint, [question(judge, metric, text.prompt, text.response) for text in texts], on_event)
    return [
        Scored(None, reason=kind_of(each.problem)) if each.text is None else _read(metric, each.text)
        for each in replies
    ]


def kind_of(problem: str) -> str:
    """Why a judge gave no answer, in words that hold nothing of what was sent or answered."""
    refused = re.match(r"the judge answers with (HTTP \d+)", problem)
    error = re.search(r"\[Errno -?\d+\] ([A-Za-z ]+)$", problem)
    known = re.search(r"timed out$|the judge's answer is not a chat completion$", problem)
    if refused or error:
        return (refused or error or [problem, problem])[1].lower().replace("http", "HTTP")
    return known[0] if known else problem.partition(": ")[0]


def _read(metric: Metric, reply: str) -> Scored:
    value = score(metric, reply)
    return Scored(value, reason="unreadable" if value is None else "")


def key_of(judge: Judge) -> str:
    """The API key of a judge; empty where it has none. Raises UsageError for one that can't be sent."""
    key = os.environ.get(judge.key_variable, "").strip() if judge.key_variable else ""
    require_sendable(key, f"the environment variable {judge.key_variable}, for the judge {judge.name}")
    return key


def require_keys(experiment: Experiment) -> None:
    """Raise UsageError, with all problems, where the key of a judge can't be sent."""
    errors: list[SteerError] = []
    for judge in experiment.judges:
        with collecting(errors):
            key_of(judge)
    raise_together(errors)


def question(judge: Judge, metric: Metric, prompt: str, text: str) -> str:
    """What a judge is asked; prompt and answer stand between marks, which no text can close."""
    return f"{judge.instruction}\n\n{block('prompt', prompt)}{block('response', text)}{_FORMAT[metric.kind]}"


def score(metric: Metric, reply: str) -> float | None:
    """The score in a judge's reply; None where there is none, or one outside of the metric's range."""
    found = _SCORE.findall(without_reasoning(reply))
    if not found:
        return None
    word = found[-1].lower()
    if metric.kind == "bool":
        return _WORDS.get(word)
    try:
        value = float(word)
    except ValueError:
        return None
    low = metric.low if metric.low is not None else float("-inf")
    high = metric.high if metric.high is not None else float("inf")
    return value if low <= value <= high and abs(value) < GREATEST else None
