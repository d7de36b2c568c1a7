"""The scorers, hand labels and tasks that a request names: checked before a model is loaded, run on what arms wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.models.loading import LoadedModel
from probes.statistics import paired
from steer.evaluation.arms.arm import BASE
from steer.evaluation.harness.tasks import TaskFigure, require_tasks
from steer.evaluation.judging import options as judging
from steer.evaluation.judging.agreement import Labels, read_labels
from steer.evaluation.measuring.generations import Generation
from steer.evaluation.request import Request
from steer.evaluation.scorers import ConfiguredScorer, GeneratedText, Resources, configured, parse, scorer
from steer.evaluation.scoring import ScorerReport, score_arms
from steer.evaluation.suites.items import Suite
from vectors.errors import SteerError, UsageError, collecting
from vectors.events import OnEvent, ignore


class Requested(NamedTuple):
    """The scorers of a request, the hand labels (None without), and the digests of what they read."""

    scorers: list[ConfiguredScorer]
    labels: Labels | None
    digests: dict[str, str]


def read_requested(request: Request, errors: list[SteerError]) -> Requested:
    """The scorers and labels that a request names; every problem is appended to `errors`."""
    scorers: list[ConfiguredScorer] = []
    for text in request.scorer:
        with collecting(errors):
            scorers.append(parse(text))
    if request.judge is not None:
        with collecting(errors):
            scorers.append(_judge(request))
    errors += judging.errors_without_judge(request)
    names = [each.name for each in scorers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problem = f"several scorers are called {', '.join(twice)}"
        errors.append(UsageError(problem, "name them: --scorer NAME=KIND:VALUE"))
    if scorers and not request.max_tokens:
        errors.append(UsageError("--max-tokens is 0, so there are no answers to score", "leave it out"))
    labels = None
    if request.labels is not None:
        with collecting(errors):
            labels = read_labels(request.labels)
        if not request.scorer and request.judge is None:
            errors.append(UsageError("--labels has no scorer to compare with", "name one: --scorer, or --judge"))
    if request.task:
        with collecting(errors):
            require_tasks(request.task)
    digests = {} if labels is None else {"labels": labels.digest}
    for each in scorers:
        with collecting(errors):
            read = scorer(each.kind).inputs_of(each.settings)
            digests |= {f"{each.name} {Path(file).name}": digest for file, digest in read.items()}
    return Requested(scorers, labels, digests)


def _judge(request: Request) -> ConfiguredScorer:
    """The judge of a request. Raises UsageError with all problems."""
    entry: dict[str, Any] = {"kind": "judge", "judge": request.judge}
    given = {"model": request.judge_model, "concept": request.concept, "key_file": request.judge_key_file}
    entry |= {name: str(value) for name, value in given.items() if value is not None}
    if request.concept is None:
        entry["concept"] = " "  # so that the other problems are found too
        try:
            configured(entry, Path(), "--judge")
        except UsageError as error:
            problems = [problem for problem in error.problems if "concept" not in problem]
            raise UsageError(["--judge needs a concept", *problems], '--concept "a warm, friendly tone"') from error
    return configured(entry, Path(), "--judge")


def score_answers(
    requested: Requested,
    answers: Mapping[str, Sequence[Generation]],
    loaded: LoadedModel,
    suite: Suite,
    *,
    seed: int = 0,
    device: str = "auto",
    on_event: OnEvent = ignore,
) -> list[ScorerReport]:
    """What the scorers say of the answers of every arm; prompts of the suite that share a group count as fewer."""
    if not requested.scorers or not answers:
        return []
    texts = {name: [GeneratedText(each.prompt, each.text) for each in written] for name, written in answers.items()}
    of_prompt = {prompt.text: prompt.group for prompt in suite.prompts}
    groups = [of_prompt.get(each.prompt) or each.prompt for each in next(iter(answers.values()))]
    return score_arms(
        texts, requested.scorers, Resources(loaded=loaded, device=device, seed=seed, on_event=on_event),
        base=BASE, groups=groups if any(of_prompt.values()) else (), labels=requested.labels,
    )  # fmt: skip


def task_values(figures: Mapping[str, Sequence[TaskFigure]], seed: int = 0) -> list[dict[str, Any]]:
    """The tasks of every arm as JSON values, with the paired difference from the base over the same documents."""
    base = {(each.task, each.metric): each for each in figures.get(BASE, ())}
    values = []
    for arm, listed in figures.items():
        for each in listed:
            reference = base.get((each.task, each.metric))
            values.append(
                {
                    "arm": arm,
                    "task": each.task,
                    "metric": each.metric,
                    "value": each.value,
                    "error": each.error,
                    "higher_is_better": each.higher_is_better,
                    "documents": len(each.samples),
                    "difference": None if arm == BASE or reference is None else _difference(each, reference, seed),
                }
            )
    return values


def _difference(figure: TaskFigure, base: TaskFigure, seed: int) -> dict[str, Any] | None:
    import torch

    both = sorted(figure.samples.keys() & base.samples.keys())
    if not both:
        return None
    differences = torch.tensor([figure.samples[i] - base.samples[i] for i in both], dtype=torch.float64)
    return paired.difference(differences, seed=seed)._asdict()
