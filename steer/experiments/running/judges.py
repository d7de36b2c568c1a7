"""Judges of sampled answers: models behind an OpenAI-compatible endpoint, scorers, probes. Their scores are feedback.

Which answers are judged depends on their ids alone, so arms are sampled alike. Judging happens in a thread of its own,
behind a bounded queue: a slow judge, or none, holds up nothing, and what finds no place is not judged.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from typing import Any, NamedTuple

from steer.evaluation import scorers
from steer.evaluation.scorers import Resources
from steer.experiments import feedback
from steer.experiments.assignment import fraction
from steer.experiments.running.questions import scores_by
from steer.experiments.running.readouts import Read, value_of
from steer.experiments.specification import Experiment, Judge
from steer.experiments.storage.writer import Writer
from vectors.errors import SteerError

_log = logging.getLogger("steer")

WAITING = 256  # answers that wait for a judge
TOGETHER = 8  # answers that a judge is sent at once


class _Answer(NamedTuple):
    response: str
    version: int
    prompt: str
    text: str


class Judging:
    """The judges of one experiment; `read` reads answers for those that are probes. Ends with `end`."""

    def __init__(self, experiment: Experiment, writer: Writer, read: Read | None = None) -> None:
        self.experiment, self.writer, self.read = experiment, writer, read
        self.resources = Resources()
        self.skipped = 0  # sampled answers that found no place
        self.failed = 0  # that a judge did not score
        self.logged: set[tuple[str, str]] = set()  # judges and kinds of errors
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
                chosen = [answer for answer in present if sampled(self.experiment, judge, answer.response)]
                try:
                    self._judge(judge, chosen)
                except Exception as error:  # the thread goes on, for the other judges too
                    self.failed += len(chosen)
                    self._say(judge, error)
            if len(present) < len(answers):
                return

    def _say(self, judge: Judge, error: Exception) -> None:
        """Log the kind of an error, once: its text may hold what is secret, such as a key or an answer."""
        kind = judge.name, type(error).__name__
        if kind not in self.logged:
            self.logged.add(kind)
            _log.error("experiment %s: the judge %s fails: %s", self.experiment.name, *kind)

    def _judge(self, judge: Judge, answers: list[_Answer]) -> None:
        metric = self.experiment.metrics()[judge.name]
        if judge.name in self.experiment.readouts:
            self._record(judge, answers, self._read(judge, answers))
            return
        if judge.scorer:
            self._record(judge, answers, self._scored(judge, answers))
            return
        texts = [scorers.GeneratedText(answer.prompt, answer.text) for answer in answers]
        self._record(judge, answers, scores_by(judge, metric, texts, attempts=2, timeout=60.0))

    def _read(self, judge: Judge, answers: list[_Answer]) -> list[float | None]:
        """The value of each answer by a probe; None where the engine has not read it."""
        metric, probe = self.experiment.metrics()[judge.name], self.experiment.readouts[judge.name]
        if self.read is None:
            return [None] * len(answers)
        scores = self.read(judge, [(json.loads(answer.prompt), answer.text) for answer in answers])
        return [None if score is None else value_of(metric, probe, score) for score in scores]

    def _scored(self, judge: Judge, answers: list[_Answer]) -> list[float | None]:
        """The score of each answer by a scorer of texts; None where it fails."""
        texts = [scorers.GeneratedText(answer.prompt, answer.text) for answer in answers]
        try:
            configured = scorers.parse(judge.scorer, self.experiment.file.parent)
            return [scored.value for scored in configured.score(texts, self.resources)]
        except (SteerError, OSError, ValueError, RuntimeError):  # such as a classifier that is not there any more
            return [None] * len(answers)

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


def sampled(experiment: Experiment, judge: Judge, response: str) -> bool:
    """Whether a judge is to score an answer, given its id."""
    return fraction("judge", judge.name, experiment.salt, response) < judge.sample_rate
