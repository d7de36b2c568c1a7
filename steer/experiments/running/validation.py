"""How far the judges of an experiment agree with people, on texts with hand labels: judges are measured too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from probes.intervals import auroc, draw_resamples, supported
from steer.evaluation import scorers
from steer.evaluation.judging.agreement import FEW, Labels, agreement
from steer.evaluation.scorers import GeneratedText, Resources
from steer.experiments.running.questions import scores_by
from steer.experiments.running.readouts import values_of
from steer.experiments.specification import Experiment, Judge

KAPPA, AUROC = "kappa", "AUROC"


class Validated(NamedTuple):
    """How a judge agrees with hand labels of yes and no, where 1 and 2 are yes.

    `measure` is Cohen's kappa for a metric that is yes or no, the AUROC for one that is a number; `value` is None where
    it is not defined, since the labels or the scores are all alike. `missing` texts have a label and no score.
    """

    judge: str
    measure: str
    value: float | None
    interval: tuple[float, float] | None
    labels: int
    missing: int

    def sentence(self) -> str:
        """What was measured, in words; it begins with the judge's name."""
        scored = self.labels - self.missing
        of = f"{scored} of {self.labels} hand labels" if self.missing else f"{self.labels} hand labels"
        if self.value is None:
            return f"{self.judge}: {of} do not tell how far the judge agrees with people"
        ends = f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval is not None else ""
        few = f"; fewer than {FEW} do not suffice" if scored < FEW else ""
        return f"{self.judge}: the judge agrees with {of} by {self.measure} {self.value:.2f}{ends}{few}"


def validate(experiment: Experiment, labels: Labels, resources: Resources, seed: int = 0) -> list[Validated]:
    """Let every judge score the labelled texts, and compare. `resources` hold the model, where a judge is a probe."""
    texts = [GeneratedText(each.prompt, each.response) for each in labels.texts]
    return [_validated(experiment, judge, labels, scores(experiment, judge, texts, resources), seed)
            for judge in experiment.judges]  # fmt: skip


def scores(
    experiment: Experiment, judge: Judge, texts: Sequence[GeneratedText], resources: Resources
) -> list[float | None]:
    """A judge's value for each text, as on live traffic."""
    metric = experiment.metrics()[judge.name]
    if not judge.scorer:
        return scores_by(judge, metric, texts, resources.on_event)
    found = scorers.parse(judge.scorer, experiment.file.parent, "scorer").score(texts, resources)
    return values_of(experiment, judge.name, found)


def _validated(
    experiment: Experiment, judge: Judge, labels: Labels, values: Sequence[float | None], seed: int
) -> Validated:
    count, missing = len(values), sum(value is None for value in values)
    if experiment.metrics()[judge.name].kind == "bool":
        decisions = [None if value is None else int(value > 0.5) for value in values]
        found = agreement(labels, decisions, graded=False, seed=seed)
        return Validated(judge.name, KAPPA, found.kappa, found.interval, count, missing)
    pairs = [(value, each.label > 0) for value, each in zip(values, labels.texts, strict=True) if value is not None]
    yes = torch.tensor([label for _, label in pairs], dtype=torch.bool)
    if not bool(yes.any()) or bool(yes.all()):
        return Validated(judge.name, AUROC, None, None, count, missing)
    scored: Any = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    ends = supported(scored, yes, draw_resamples(yes, seed))
    return Validated(judge.name, AUROC, auroc(scored[yes], scored[~yes]), ends, count, missing)
