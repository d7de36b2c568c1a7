"""Judges of sampled answers: models behind an OpenAI-compatible endpoint, scorers, probes. Their scores are feedback.

Which answers are judged depends on their ids alone, so arms are sampled alike. Judging happens in a thread of its own,
behind a bounded queue: a slow judge, or none, holds up nothing, and what finds no place is not judged.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from steer.evaluation import scorers
from steer.evaluation.scorers import Resources, Scored
from steer.experiments import feedback
from steer.experiments.assignment import fraction
from steer.experiments.running.questions import scored_by
from steer.experiments.running.readouts import Read, value_of
from steer.experiments.specification import Experiment, Judge
from steer.experiments.storage.writer import Writer
from vectors.errors import SteerError

_log = logging.getLogger("steer")

WAITING = 256  # answers that wait for a judge
TOGETHER = 8  # answers that a judge is sent at once
SILENT = 300.0  # seconds between two lines in the server's log about one judge and reason


class _Answer(NamedTuple):
    response: str
    version: int
    prompt: str
    text: str


class Judging:
    """The judges of one experiment; `read` reads answers for those that are probes. Ends with `end`.

    `note` puts (judge and reason, count) of answers without a score into the experiment's log: at the first, the tenth,
    the hundredth, and so on.
    """

    def __init__(
        self, experiment: Experiment, writer: Writer, read: Read | None = None,
        note: Callable[[str, int], None] = lambda reason, count: None,
    ) -> None:  # fmt: skip
        self.experiment, self.writer, self.read = experiment, writer, read
        self.resources = Resources()
        self.skipped = 0  # sampled answers that found no place
        self.note = note
        self.lock = threading.Lock()  # of the counts
        self.scored = Counter({judge.name: 0 for judge in experiment.judges})
        self.unscored: dict[str, Counter[str]] = {judge.name: Counter() for judge in experiment.judges}  # by reason
        self.logged: dict[tuple[str, str], float] = {}  # when a judge and a reason were last in the server's log
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
                    # Its text may hold what is secret, such as a key or an answer.
                    self._miss(judge, Counter({type(error).__name__: len(chosen)}))
            if len(present) < len(answers):
                return

    @property
    def failed(self) -> int:
        """The sampled answers that a judge did not score."""
        with self.lock:
            return sum(reasons.total() for reasons in self.unscored.values())

    def state(self) -> dict[str, Any]:
        """How many answers were skipped, scored and not scored, and why, as JSON values."""
        with self.lock:
            of_judges = {
                name: {"scored": self.scored[name], "failed": reasons.total(), "reasons": dict(reasons)}
                for name, reasons in self.unscored.items()
            }
        return {"skipped": self.skipped, "failed": self.failed, "by_judge": of_judges}

    def _miss(self, judge: Judge, reasons: Counter[str]) -> None:
        """Count answers without a score by reason, and say so now and then."""
        now = time.monotonic()
        for reason, count in reasons.items():
            if not count:
                continue
            with self.lock:
                before = self.unscored[judge.name][reason]
                self.unscored[judge.name][reason] = total = before + count
            if now - self.logged.get((judge.name, reason), -SILENT) >= SILENT:
                self.logged[judge.name, reason] = now
                _log.warning(
                    "experiment %s: the judge %s fails: %s (%d answers so far have no score)",
                    self.experiment.name, judge.name, reason, total,
                )  # fmt: skip
            if not before or len(str(total)) > len(str(before)):
                self.note(f"{judge.name}: {reason}", total)

    def _judge(self, judge: Judge, answers: list[_Answer]) -> None:
        metric = self.experiment.metrics()[judge.name]
        if judge.name in self.experiment.readouts:
            self._record(judge, answers, self._read(judge, answers))
            return
        if judge.scorer:
            self._record(judge, answers, self._scored(judge, answers))
            return
        texts = [scorers.GeneratedText(answer.prompt, answer.text) for answer in answers]
        self._record(judge, answers, scored_by(judge, metric, texts, attempts=2, timeout=60.0))

    def _read(self, judge: Judge, answers: list[_Answer]) -> list[Scored]:
        """The value of each answer by a probe, if the engine has read it."""
        metric, probe = self.experiment.metrics()[judge.name], self.experiment.readouts[judge.name]
        unread = Scored(None, reason="the engine has not read it")
        if self.read is None:
            return [unread] * len(answers)
        scores = self.read(judge, [(json.loads(answer.prompt), answer.text) for answer in answers])
        return [unread if score is None else Scored(value_of(metric, probe, score)) for score in scores]

    def _scored(self, judge: Judge, answers: list[_Answer]) -> list[Scored]:
        """The score of each answer by a scorer of texts, or the kind of the error where it fails."""
        texts = [scorers.GeneratedText(answer.prompt, answer.text) for answer in answers]
        try:
            configured = scorers.parse(judge.scorer, self.experiment.file.parent, "scorer")
            return configured.score(texts, self.resources)
        except (SteerError, OSError, ValueError, RuntimeError) as error:  # such as a classifier that is gone
            return [Scored(None, reason=type(error).__name__)] * len(answers)

    def _record(self, judge: Judge, answers: list[_Answer], scores: list[Scored]) -> None:
        self._miss(judge, Counter(each.reason or "no score" for each in scores if each.value is None))
        for answer, scored in zip(answers, scores, strict=True):
            if scored.value is None:
                continue
            with self.lock:
                self.scored[judge.name] += 1
            body: dict[str, Any] = {"response_id": answer.response, "metric": judge.name, "value": scored.value}
            body["idempotency_key"] = answer.response + judge.name
            row = feedback.row_of(
                body, self.experiment, conversation=None, version=answer.version, mark="", source="judge"
            )
            self.writer.add("feedback", row)


def sampled(experiment: Experiment, judge: Judge, response: str) -> bool:
    """Whether a judge is to score an answer, given its id."""
    return fraction("judge", judge.name, experiment.salt, response) < judge.sample_rate
