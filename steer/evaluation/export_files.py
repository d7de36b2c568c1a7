"""The files that `--export` adds to the folder of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.evaluation.evaluation import Evaluation
from steer.evaluation.exports import harness_vector, inspect_log
from steer.evaluation.exports.inspect_log import Metric, Sample
from steer.evaluation.suites.items import Item, Pair
from vectors.storage.files import digest_file


def write_exports(evaluation: Evaluation, folder: Path) -> dict[str, str]:
    """Write the further files into the folder; returns their digests by path. Raises UsageError, OutputError."""
    written: list[Path] = []
    if "inspect" in evaluation.request.export:
        (folder / "inspect").mkdir()
        for position, name in enumerate(evaluation.arms):
            written.append(folder / "inspect" / inspect_log.file_name(name))
            inspect_log.write(written[-1], _log(evaluation, name, position))
    if "lm-eval" in evaluation.request.export:
        for number, result in enumerate(evaluation.subjects, 1):
            written.append(folder / ("lm-eval.pt" if len(evaluation.subjects) == 1 else f"lm-eval-{number}.pt"))
            harness_vector.write(written[-1], result.plan.subject.arm)
    return {str(path.relative_to(folder)): digest_file(path) for path in written}


def _log(evaluation: Evaluation, name: str, position: int) -> dict[str, Any]:
    """The Inspect log of one arm: the test items with their figures, and the prompts with answers and scores."""
    from steer import __version__

    arm, inputs, request = evaluation.arms[name], evaluation.inputs, evaluation.request
    figures = evaluation.figures[position].tolist()
    samples = [_item_sample(item, figure) for item, figure in zip(inputs.test, figures, strict=True)]
    scored = [(each.scorer.name, each.arms[name].scored) for each in evaluation.scores if name in each.arms]
    for index, answer in enumerate(evaluation.answers.get(name, [])):
        samples.append(
            Sample(
                f"prompt {index}",
                answer.prompt,
                output=answer.text,
                scores={scorer: values[index].value for scorer, values in scored},
                missing={scorer: v[index].reason for scorer, v in scored if v[index].value is None},
            )
        )
    metrics = [
        Metric(f"{metric} less the base's", effect[name].mean, effect[name].low, effect[name].high)
        for metric, effect in evaluation.effects.items()
    ]
    for each in evaluation.scores:
        if name in each.arms:
            rate = each.arms[name].rate
            metrics.append(Metric(each.scorer.name, rate.mean, *(rate.interval or (None, None))))
    config = {
        "arm": name,
        "expression": None if arm.composition is None else str(arm.composition),
        "vectors": {vector: arm.vectors[vector].digest for vector in arm.vectors},
        "probes": {probe: arm.probes[probe].digest for probe in arm.probes},
        "system": arm.system,
        "seed": request.seed,
        "max_tokens": request.max_tokens,
        "suite": dict(inputs.suite.digests),
    }
    return inspect_log.inspect_log(
        inputs.suite.name, name, samples, metrics, model=inputs.reference, config=config, version=__version__
    )


def _item_sample(item: Item, figure: float) -> Sample:
    """A test item; a prompt that is a conversation stands as its turns, one below the other."""
    if isinstance(item, Pair):
        context = item.positive.context
        turns = (
            context
            if isinstance(context, str | None)
            else "\n".join(f"{turn.role}: {turn.content}" for turn in context)
        )
        return Sample(item.id, turns or "", item.positive.completion, scores={"margin": figure}, group=item.group)
    target = item.options[item.positive]
    return Sample(item.id, item.question, target, scores={"log-odds": figure}, group=item.group)
