"""Judges of sampled answers: models behind an OpenAI-compatible endpoint, or scorers; their scores are feedback.

Which answers are judged depends on their ids alone, so arms are sampled alike. Judging happens in a thread of its own,
behind a bounded queue: a slow judge, or none, holds up nothing, and what finds no place is not judged.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from typing import Any, NamedTuple

from steer.evaluation.judging.client import ask
from steer.evaluation.judging.endpoint import Endpoint
from steer.evaluation.judging.ratings import block, without_reasoning
from steer.experiments import feedback
from steer.experiments.assignment import fraction
from steer.experiments.specification import Experiment, Judge, Metric
from steer.experiments.storage.writer import Writer
from vectors.errors import SteerError

WAITING = 256  # answers that wait for a judge
TOGETHER = 8  # answers that a judge is sent at once
_SCORE = re.compile(r"\[\[\s*([^\]\n]{1,20}?)\s*\]\]")
_WORDS = {"yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
_FORMAT = {
    "bool": 'End with "Answer: [[yes]]" or "Answer: [[no]]" alone on the last line.',
    "number": 'End with the score alone on the last line, in exactly this form: "Score: [[3]]".',
}


class _Answer(NamedTuple):
    response: str
    version: int
    prompt: str
    text: str


class Judging:
    """The judges of one experiment. Ends with `end`."""

    def __init__(self, experiment: Experiment, writer: Writer) -> None:
        self.experiment, self.writer = experiment, writer
        self.skipped = 0  # sampled answers that found no place
        self.failed = 0  # that a judge did not score
        self.waiting: queue.Queue[_Answer | None] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._run, name="steer-judge", daemon=True)
        self.thread.start()

    def offer(self, response: str, version: int, prompt: str, text: str) -> None:
        """Have an answer judged, if it is sampled. Never waits."""
        if not any(sampled(self.experiment, judge, response) for judge in self.experiment.judges):
            return
        try:
            self.waiting.put_nowait(_Answer(response, version, prompt, text))
        except queue.Full:
            self.skipped += 1

    def end(self) -> None:
        """End the thread; what waits is not judged."""
        try:
            self.waiting.put_nowait(None)
        except queue.Full:
            return  # the thread is a daemon

    def _run(self) -> None:
        while True:
            answers = [self.waiting.get()]
            while len(answers) < TOGETHER and not self.waiting.empty():
                answers.append(self.waiting.get())
            present = [answer for answer in answers if answer is not None]
            for judge in self.experiment.judges:
                self._judge(judge, [a for a in present if sampled(self.experiment, judge, a.response)])
            if len(present) < len(answers):
                return

    def _judge(self, judge: Judge, answers: list[_Answer]) -> None:
        metric = self.experiment.metrics()[judge.name]
        if judge.scorer:
            self._record(judge, answers, _scored(judge, answers))
            return
        key = os.environ.get(judge.key_variable, "") if judge.key_variable else ""
        endpoint = Endpoint(url=judge.url.rstrip("/"), model=judge.model, key=key, attempts=2, timeout=60.0)
        replies = ask(endpoint, [question(judge, metric, answer.prompt, answer.text) for answer in answers])
        self._record(judge, answers, [None if r.text is None else score(metric, r.text) for r in replies])

    def _record(self, judge: Judge, answers: list[_Answer], values: list[float | None]) -> None:
        for answer, value in zip(answers, values, strict=True):
            if value is None:
                self.failed += 1
                continue
            body: dict[str, Any] = {"response_id": answer.response, "metric": judge.name, "value": value}
            body["idempotency_key"] = answer.response + judge.name
            row = feedback.row_of(
                body, self.experiment, conversation=None, version=answer.version, mark="", source="judge"
            )
            self.writer.add("feedback", row)


def _scored(judge: Judge, answers: list[_Answer]) -> list[float | None]:
    """The score of each answer by a scorer of texts; None where it fails."""
    from steer.evaluation import scorers

    texts = [scorers.GeneratedText(answer.prompt, answer.text) for answer in answers]
    try:
        return [scored.value for scored in scorers.parse(judge.scorer).score(texts, scorers.Resources())]
    except (SteerError, OSError, ValueError, RuntimeError):  # such as a classifier that is not there any more
        return [None] * len(answers)


def sampled(experiment: Experiment, judge: Judge, response: str) -> bool:
    """Whether a judge is to score an answer, given its id."""
    return fraction("judge", judge.name, experiment.salt, response) < judge.sample_rate


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
    return value if low <= value <= high and abs(value) < 1e15 else None
