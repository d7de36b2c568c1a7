"""An evaluation as JSON values: `report.json`, what `--json` prints, and the record of the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from steer.evaluation.arms.controls import CONTROLS
from steer.evaluation.evaluation import Evaluation, SubjectResult
from steer.evaluation.judgement import value_of
from steer.evaluation.text_scores import task_values
from vectors.registry.options import flags_of
from vectors.storage.files import finite
from vectors.storage.runs import RunRecord, environment

SCHEMA = 1
PACKAGES = ("steer-workbench", "torch", "transformers")
ROUNDING = 1e-4  # nats by which figures of the same computation differ, in batches of other shapes; a KL by its square


def report(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was measured, as JSON values, with None for what is not finite."""
    inputs, request = evaluation.inputs, evaluation.request
    counts = {
        "test": len(inputs.test), "dev": len(inputs.dev), "neutral": len(inputs.neutral),
        "prompts": len(inputs.prompts), "test_in_suite": len(inputs.suite.of("test")),
        "dev_in_suite": len(inputs.suite.of("dev")),
    }  # fmt: skip
    value = {
        "schema": SCHEMA,
        "suite": {"name": inputs.suite.name, "digests": dict(inputs.suite.digests), "items": counts},
        "model": {"reference": inputs.reference, "digest": evaluation.model.identity["digest"]},
        "seed": request.seed,
        "subjects": [_subject(evaluation, each) for each in evaluation.subjects],
        "arms": [_arm(evaluation, name) for name in evaluation.arms],
        "examples": examples(evaluation),
        "scores": [each.value() for each in evaluation.scores],
        "tasks": task_values(evaluation.tasks, request.seed),
        "notes": notes(evaluation),
        "overlap": inputs.overlap,
        "command": command(evaluation),
    }
    return finite(value)


def _subject(evaluation: Evaluation, result: SubjectResult) -> dict[str, Any]:
    subject = result.plan.subject
    composition = subject.arm.composition
    return {
        "subject": subject.name,
        "kind": subject.kind,
        "outcome": result.outcome,
        "sentence": result.sentence,
        "operating_point": {
            "expression": None if composition is None else str(composition),
            "digest": None if composition is None else composition.digest,
            "from": subject.point,
            "dose": result.dose,
            "kl": evaluation.divergences[subject.arm.name]._asdict(),
        },
        "vectors": {name: vector.digest for name, vector in subject.arm.vectors.items()},
        "probes": {name: probe.digest for name, probe in subject.arm.probes.items()},
        "metrics": [value_of(each) for each in result.judged],
        "entangled": [{"suite": each.suite, **each.change._asdict()} for each in result.entangled],
        "entanglement": result.entanglement,
    }


def _arm(evaluation: Evaluation, name: str) -> dict[str, Any]:
    subject, control = evaluation.families[name]
    texts = evaluation.texts.get(name)
    base = evaluation.texts.get("base")
    ratio = texts.length / base.length if texts and base and base.length else None
    arm = evaluation.arms[name]
    return {
        "arm": name,
        "subject": subject,
        "family": control,
        "expression": None if arm.composition is None else str(arm.composition),
        "system": arm.system,
        "effects": {metric: by_arm[name]._asdict() for metric, by_arm in evaluation.effects.items()},
        "kl": evaluation.divergences[name]._asdict(),
        "texts": None if texts is None else {**texts._asdict(), "length_ratio": ratio},
    }


def examples(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The answers of the main arms, prompt by prompt."""
    return [
        {
            "prompt": prompt,
            "answers": {
                name: {"text": written[index].text, "finish": written[index].finish}
                for name, written in evaluation.answers.items()
            },
        }
        for index, prompt in enumerate(evaluation.inputs.prompts)
        if evaluation.answers
    ]


def notes(evaluation: Evaluation) -> list[str]:
    """Sentences about what was measured, and what could not be."""
    inputs = evaluation.inputs
    lines = [*inputs.suite.notes, *(f"{suite.name}: {note}" for suite, _ in inputs.entangled for note in suite.notes)]
    lines += [note for result in evaluation.subjects for note in result.plan.notes]
    lines += [line for result in evaluation.subjects for line in of_conditions(evaluation, result)]
    lines += [line for result in evaluation.subjects for line in of_no_change(evaluation, result)]
    families = {family for _, family in evaluation.families.values()}
    if "shuffled" in families:
        lines.append(f"shuffled labels are those of {inputs.shuffled_source}")
    lines += [f"{name}: {CONTROLS[name]}" for name in CONTROLS if name in families]
    if inputs.overlap:
        lines.append("the test items overlap with what a vector was extracted from or chosen on, which --allow-overlap "
                     "allowed: the effect is not one on unseen items")  # fmt: skip
    return lines


def of_conditions(evaluation: Evaluation, result: SubjectResult) -> list[str]:
    """Where the conditions of a subject hold at no token, so that its figures are the base's, up to rounding."""
    arm = result.plan.subject.arm
    if arm.composition is None or not arm.composition.conditions:
        return []
    listed, lines = ", ".join(map(str, arm.composition.conditions)), []
    if result.judged and all(max(abs(each.effect.low), abs(each.effect.high)) < ROUNDING for each in result.judged):
        lines.append(f"{arm.name} changes no test item: {listed} holds at none of their tokens")
    if evaluation.divergences[arm.name].mean < ROUNDING**2:
        lines.append(f"{listed} holds at no token of the neutral text, so the KL says nothing of what {arm.name} costs "
                     "where it acts")  # fmt: skip
    return lines


def of_no_change(evaluation: Evaluation, result: SubjectResult) -> list[str]:
    """A note where a subject's figures are exactly the base's, so that nothing is known of how items would vary."""
    arm, names = result.plan.subject.arm, list(evaluation.arms)
    if arm.composition is not None and arm.composition.conditions:
        return []  # `of_conditions` says why
    if not evaluation.figures[names.index(arm.name)].equal(evaluation.figures[names.index("base")]):
        return []
    return [f"{result.plan.subject.name} changes nothing on the test items: all differences from the base are exactly "
            "0, so there is no detectable difference, and no share of items that go the wrong way"]  # fmt: skip


def command(evaluation: Evaluation) -> str:
    """The command line that repeats the evaluation."""
    request = evaluation.request
    flags, words = flags_of(request), ["steer", "eval"]
    defaults = {field.name: field.default for field in fields(request)}
    for name, flag in flags.items():
        value = getattr(request, name)
        if flag.argument:
            words += map(str, value)
            continue
        if value == defaults[name] or value is None or value == () or value == {} or name == "out":
            continue
        word = flag.word(name)
        if value is True:
            words.append(word)
        elif isinstance(value, Mapping):
            words += [part for key, each in value.items() for part in (word, f"{key}={each}")]
        elif name == "curve":
            words += [word, ",".join(f"{each:g}" for each in value)]
        elif isinstance(value, tuple):
            words += [part for each in value for part in (word, str(each))]
        else:
            words += [word, str(value)]
    return shlex.join(words)


def record(evaluation: Evaluation, value: Mapping[str, Any], outputs: Mapping[str, str]) -> RunRecord:
    """The record of the run; `value` is the report, `outputs` are the digests of the written files."""
    request = evaluation.request
    config = {field.name: _plain(getattr(request, field.name)) for field in fields(request) if field.name != "out"}
    inputs = {
        "suite": value["suite"]["digests"],
        "scorers": evaluation.inputs.requested.digests,
        "base": evaluation.model.identity,
        "vectors": {
            name: digest for subject in value["subjects"] for name, digest in subject["vectors"].items()
        },
    }  # fmt: skip
    metrics = {
        "subjects": [{key: subject[key] for key in ("subject", "outcome", "sentence")} for subject in value["subjects"]]
    }
    return RunRecord(
        "eval", "", config, inputs, environment(*PACKAGES), metrics, outputs, {"command": value["command"]}
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
