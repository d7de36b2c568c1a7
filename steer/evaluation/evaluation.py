"""An evaluation: every arm on the same items, what it costs elsewhere, and a verdict for each subject."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from probes.capture.token_states import token_states
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, load
from probes.models.packed_linear import packed_linear
from probes.models.tokens import rendered
from probes.statistics.paired import Difference, difference
from probes.statistics.strata import balanced
from steer.evaluation.arms.arm import BASE, Arm
from steer.evaluation.arms.controls import acting_layers
from steer.evaluation.arms.weights import loaded_arm, reference_of
from steer.evaluation.harness.tasks import TaskFigure, measure_tasks
from steer.evaluation.inputs import Inputs, open_fitting, read_inputs
from steer.evaluation.judgement import Judged, judged, metrics_of, outcome_of, sentence
from steer.evaluation.measuring.divergences import Divergence, Neutral, neutral_text, summary
from steer.evaluation.measuring.engine import Engine, Hooks, Through, measured_once
from steer.evaluation.measuring.generations import Generation, TextFigures, text_figures
from steer.evaluation.planning import Plan, Wanted, plan_of
from steer.evaluation.request import Request
from steer.evaluation.scoring import ScorerReport
from steer.evaluation.suites.items import Item, groups_of, is_grouped, strata_of
from steer.evaluation.text_scores import score_answers
from vectors.events import Event, OnEvent, ignore
from vectors.language.markers import markers_in


class Entangled(NamedTuple):
    """The change of another suite's figures under a subject."""

    suite: str
    change: Difference


class SubjectResult(NamedTuple):
    """One subject: its plan, what was judged under each metric, its outcome and the sentence about it.

    `dose` is |strength| x |direction| / |residual stream|, the largest over its layers, NaN for what is no vector.
    `entanglement` is the root mean square of the changes on other suites, NaN without any.
    """

    plan: Plan
    judged: list[Judged]
    outcome: str
    sentence: str
    dose: float
    entangled: list[Entangled]
    entanglement: float


class Evaluation(NamedTuple):
    """Everything that was measured. `effects` [metric][arm] are paired with the base, on test items."""

    request: Request
    inputs: Inputs
    model: LoadedModel
    subjects: list[SubjectResult]
    arms: dict[str, Arm]
    families: dict[str, tuple[str, str]]  # of each arm: its subject and its control, or ("", "prompt") and the like
    effects: dict[str, dict[str, Difference]]
    divergences: dict[str, Divergence]
    texts: dict[str, TextFigures]
    answers: dict[str, list[Generation]]
    figures: Tensor  # float64 [arms, test items], in the order of `arms`
    scores: list[ScorerReport]
    tasks: dict[str, list[TaskFigure]]  # by arm


def run(request: Request, *, through: Through | None = None, on_event: OnEvent = ignore) -> Evaluation:
    """Evaluate; what is wrong with the inputs is refused before a model is loaded. Raises SteerError.

    `through` gives the engine for all arms that share the base's weights; by default they run through hooks.
    """
    inputs = read_inputs(request)
    markers = markers_in(request.steer_markers)
    opened = open_fitting(inputs, request.any_base, markers)
    arms = [each.arm for each in inputs.subjects if each.arm.model is None]
    start = through(opened, arms, markers) if through else None
    on_event(Event("loading the model"))
    base = load(opened, request.device, request.dtype, markers)
    on_event(Event("loading the model", message=f"model {base.source}, on {base.choice}"))
    running = start(base, on_event) if start else nullcontext(Hooks(base, request.any_base, on_event))
    with running as engine, packed_linear(base.model):  # packed once for all stages
        return _evaluation(request, inputs, base, engine, on_event)


def _evaluation(request: Request, inputs: Inputs, base: LoadedModel, engine: Engine, on_event: OnEvent) -> Evaluation:
    """Everything that is measured of a base, whose arms run on the engine."""
    neutral = neutral_text(base, inputs.neutral, seed=request.seed, on_event=on_event)
    layers = sorted({layer for subject in inputs.subjects for layer in acting_layers(subject.arm)})
    states = _states(base, neutral, layers)
    measure = measured_once(engine, neutral)
    wanted = Wanted(
        names=request.control, draws=request.draws, prompt=request.prompt, donor=inputs.donor,
        shuffled_from=inputs.shuffled_from, factors=request.curve, seed=request.seed,
    )  # fmt: skip
    plans = [plan_of(base, each, wanted, states, measure, on_event=on_event) for each in inputs.subjects]
    arms, families = _arms(plans)
    curves = {arm.name: arm for plan in plans for arm in plan.curve.values()}
    figures = dict.fromkeys(arms, torch.empty(0))
    on_dev: dict[str, Tensor] = {}
    divergences: dict[str, Divergence] = {}
    answers: dict[str, list[Generation]] = {}
    others: dict[str, list[Tensor]] = {}
    tasks: dict[str, list[TaskFigure]] = {}
    for model, group in _by_model(base, [*arms.values()], request):
        on = engine if model is base else Hooks(model, request.any_base, on_event)
        rows = on.measure_arms(inputs.test, group)
        figures.update(zip([arm.name for arm in group], rows, strict=True))
        of_group = [arm for arm in curves.values() if arm.model is None and arm.name not in divergences]
        compared = [*group, *(of_group if model is base else [])]
        kl = measure(compared) if model is base else on.measure_divergences(neutral, compared)
        divergences |= {arm.name: summary(values) for arm, values in zip(compared, kl, strict=True)}
        if model is base and curves and inputs.dev:
            dev = on.measure_arms(inputs.dev, list(curves.values()))
            on_dev = dict(zip(curves, dev, strict=True))
        main = [arm for arm in group if families[arm.name][1] in MAIN]
        if request.max_tokens:
            answers |= on.generate_arms(main, inputs.prompts, request.max_tokens)
        for _, items in inputs.entangled:
            rows = on.measure_arms(items, main)
            for arm, row in zip(main, rows, strict=True):
                others.setdefault(arm.name, []).append(row)
        if request.task:
            of_tasks = measure_tasks(
                model, request.task, main, limit=request.task_limit, seed=request.seed, any_base=request.any_base,
                on_event=on_event,
            )  # fmt: skip
            tasks |= {arm.name: figures_of_arm for arm, figures_of_arm in zip(main, of_tasks, strict=True)}
    texts = text_figures(base, answers)
    answers = {name: answers[name] for name in arms if name in answers}
    scores = score_answers(
        inputs.requested, answers, base, inputs.suite, seed=request.seed, device=request.device, on_event=on_event
    )
    metrics = metrics_of(inputs.test)
    effects = {
        metric.name: {
            name: difference(metric.of(row - figures[BASE]), metric.groups, seed=request.seed)
            for name, row in figures.items()
        }
        for metric in metrics
    }
    results = [
        _result(request, inputs, plan, figures, on_dev, divergences, states, others) for plan in plans
    ]  # fmt: skip
    return Evaluation(
        request, inputs, base, results, arms, families, effects, {name: divergences[name] for name in arms}, texts,
        answers, torch.stack([figures[name] for name in arms]), scores, tasks,
    )  # fmt: skip


MAIN = ("base", "subject", "prompt", "prompt + subject")  # the arms whose answers are written


def _arms(plans: Sequence[Plan]) -> tuple[dict[str, Arm], dict[str, tuple[str, str]]]:
    """All arms by name, each once, and the subject and family of each."""
    arms: dict[str, Arm] = {BASE: Arm(BASE)}
    families: dict[str, tuple[str, str]] = {BASE: ("", BASE)}
    for plan in plans:
        name = plan.subject.name
        listed = [("subject", plan.subject.arm), *plan.others.items()]
        listed += [(family, arm) for family, members in plan.controls.items() for arm in members]
        for family, arm in listed:
            arms.setdefault(arm.name, arm)
            families.setdefault(arm.name, ("" if family == "prompt" else name, family))
    return arms, families


def _by_model(base: LoadedModel, arms: Sequence[Arm], request: Request) -> Iterator[tuple[LoadedModel, list[Arm]]]:
    """The arms by the model that they run on, the base first; no more than one other is in memory at a time."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(reference_of(arm), []).append(arm)
    for reference, members in groups.items():
        yield (loaded_arm(base, members[0], request.device, request.dtype) if reference else base), members


def _states(base: LoadedModel, neutral: Neutral, layers: Sequence[int]) -> dict[int, Tensor]:
    """The base's residual stream on its neutral continuations, float32 [tokens, hidden], by layer."""
    if not layers:
        return {}
    ids = rendered(neutral.prompts, base.tokenizer)
    texts = [Completion(p, c) for p, c in zip(ids, neutral.continuations, strict=True)]
    return token_states(base.model, texts, layers)


def dose_of(arm: Arm, states: Mapping[int, Tensor]) -> float:
    """|strength| x |direction| / |residual stream| of an arm: terms of a layer are added, the largest layer counts.

    Of a share it is the share, of a rotation the length of the chord.
    """
    if arm.composition is None:
        return float("nan")
    by_layer: dict[int, float] = {}
    for term in arm.composition.terms:
        vector = arm.vectors[term.name]
        for layer in vector.acting(term.layers):
            if term.operation == "share":
                dose = abs(term.value) / 100
            elif term.operation == "rotate":
                dose = 2 * math.sin(math.radians(abs(term.value)) / 2)
            else:
                dose = abs(term.value) * float(vector.layers[layer].norm() / states[layer].norm(dim=1).mean())
            by_layer[layer] = by_layer.get(layer, 0.0) + dose
    return max(by_layer.values())


def _result(
    request: Request,
    inputs: Inputs,
    plan: Plan,
    figures: Mapping[str, Tensor],
    on_dev: Mapping[str, Tensor],
    divergences: Mapping[str, Divergence],
    states: Mapping[int, Tensor],
    others: Mapping[str, list[Tensor]],
) -> SubjectResult:
    name = plan.subject.arm.name
    dose = dose_of(plan.subject.arm, states)
    curve = {factor: on_dev[arm.name] for factor, arm in plan.curve.items() if arm.name in on_dev}
    curve_kl = {factor: divergences[arm.name] for factor, arm in plan.curve.items() if arm.name in divergences}
    dev_metrics = {metric.name: metric for metric in metrics_of(inputs.dev)}
    seen = frozenset(item.group for item in inputs.suite.of("dev") if item.group)
    judgements = [
        judged(plan, m, figures, dev_metrics.get(m.name), curve, curve_kl, dose, seen, request.seed)
        for m in metrics_of(inputs.test)
    ]
    entangled = [
        Entangled(suite.name, _change(items, others[name][position] - others[BASE][position], request.seed))
        for position, (suite, items) in enumerate(inputs.entangled)
    ]
    squares = [each.change.mean**2 for each in entangled]
    return SubjectResult(
        plan,
        judgements,
        outcome_of(judgements),
        sentence(plan.subject.name, judgements, divergences[name]),
        dose,
        entangled,
        (sum(squares) / len(squares)) ** 0.5 if squares else float("nan"),
    )


def _change(items: Sequence[Item], change: Tensor, seed: int) -> Difference:
    return difference(balanced(change, strata_of(items)), groups_of(items) if is_grouped(items) else None, seed=seed)
