"""What a sweep leaves behind: the recommendation in the vector, the run record, and the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.data import overlap
from probes.models.loading import LoadedModel
from steer.evaluation.suites.items import UNITS, Item, examples_of
from steer.evaluation.sweeping.request import Settings, Source
from steer.evaluation.sweeping.sweep import Swept, digest_of
from steer.reports import sweep as page
from vectors.registry.layers import together
from vectors.steering import SteeringVector
from vectors.storage import runs
from vectors.storage.files import digest_file, finite, readable_json, write_atomically

REPORT, PAGE = "report.json", "report.html"
# What to do about a vector that steers the other way: one that a sweep is given, and one that it extracts itself.
EXCHANGE = (
    "exchange the two classes in `steer extract` or in `steer sweep`, whichever has them the wrong way round (in both, "
    "nothing changes), or use it negated, such as '-1*NAME' in an expression"
)
EXCHANGED = (
    "with the two classes exchanged it would, too: extract from more examples, or use it negated, such as '-1*NAME' in "
    "an expression"
)


class Result(NamedTuple):
    """A sweep, the vector with its recommendation, and the report as JSON values."""

    swept: Swept
    vector: SteeringVector
    report: dict[str, Any]


def result(
    swept: Swept,
    vector: SteeringVector,
    source: Source,
    settings: Settings,
    loaded: LoadedModel,
    development: Mapping[str, list[str]],
) -> Result:
    """The result of a sweep, written to the folder of the settings, if any. Raises OutputError.

    `development` is what the vector records of the items that it was chosen on, as of `record_of`.
    """
    config = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
        if key != "folder"
    } | {"methods": source.methods}
    inputs = {"model": loaded.identity, **source.inputs}
    metrics = {
        "points": [point.value() for point in swept.points],
        "chosen": None if swept.chosen is None else swept.chosen.value(),
        "test": swept.test,
        "learning": swept.learning,
        "counts": swept.counts,
        "metric": swept.metric,
        "unit": UNITS[swept.metric],
    }
    digest = digest_of(finite(config), finite(inputs), finite(metrics))
    report = {"digest": digest, "config": config, "inputs": inputs, **metrics}
    if swept.chosen is not None:
        recommended = recommendation(swept, settings.budget) | {"run": digest}
        changed = {"recommended": recommended, "apply": recommended["layers"], "chosen_on": dict(development)}
        vector = SteeringVector(vector.layers, dict(vector.metadata) | changed)
        report["recommended"] = recommended
    else:
        report["nothing_recommended"] = why_nothing(swept, settings.budget, anew="vector" not in source.inputs)
        if settings.examples:
            sizes = ", ".join(map(str, settings.examples))
            report["no_learning_curve"] = (
                f"there is no learning curve (--examples {sizes}): it is measured at the point that is recommended, "
                "and nothing is"
            )
    if settings.folder is not None:
        _write(settings.folder, report, config, inputs, metrics)
    return Result(swept, vector, report)


def record_of(dev: Sequence[Item], test: Sequence[Item]) -> dict[str, list[str]]:
    """What a vector records of the development items that it was chosen on, so that no evaluation tests on them.

    An example that `test` items hold too is left out: one negative that all pairs share would make every item known.
    """
    held_out = {overlap.example_digest(example) for item in test for example in examples_of(item)}
    examples = [example for item in dev for example in examples_of(item)]
    return overlap.record([each for each in examples if overlap.example_digest(each) not in held_out])


def recommendation(swept: Swept, budget: float) -> dict[str, Any]:
    """The chosen point as the entry of a vector's metadata."""
    point, test = swept.chosen, swept.test
    assert point is not None
    layers = list(point.candidate.layers)
    reason = (
        f"{point.candidate.method} at layer {together(layers)} has the largest effect on {swept.counts['dev']} "
        f"development items ({point.effect:+.3g} {UNITS[swept.metric]}) of {len(swept.points)} points, of those within "
        f"the budget of {budget:g} nats; on {swept.counts['test']} test items {test['effect']:+.3g} "
        f"({_interval(test)}), at {test['p95']:.2g} nats on neutral text "
        "(95th percentile of the KL divergence)"
    )
    if not test["steady"]:
        reason += f"; but from -2 to 2 times the strength the test {swept.metric} does not rise throughout"
    return {"layers": layers, "strength": point.strength, "reason": reason}


def _interval(test: Mapping[str, Any]) -> str:
    """The interval in words, with what makes it too narrow; a single group, or item, has none."""
    interval = f"{test['low']:+.3g} to {test['high']:+.3g}" if math.isfinite(test["low"]) else "without an interval"
    return f"{interval}; no verdict, since {test['too_few']}" if test["too_few"] else interval


def why_nothing(swept: Swept, budget: float, *, anew: bool = False) -> str:
    """Why no point is recommended, and what to do about it; `anew` says that the sweep extracted the directions itself,
    from the files of its items, so that an exchange of the two classes turns both."""
    within, items = [point for point in swept.points if point.within], f"{swept.counts['dev']} development items"
    if not within:
        return f"no point stays within the budget of {budget:g} nats; give a greater one, or smaller strengths"
    least = min(within, key=lambda point: point.effect)
    if least.opposite and all(point.effect < 0 for point in within):
        return (
            f"every point within the budget of {budget:g} nats lowers the {swept.metric} of the {items}, at most by "
            f"{-least.effect:.3g} {UNITS[swept.metric]} ({least.candidate.method} at layer "
            f"{together(least.candidate.layers)}, strength {least.strength:g}), so the vector steers the other way; "
            + (EXCHANGED if anew else EXCHANGE)
        )
    return (
        f"at no point within the budget of {budget:g} nats does the {swept.metric} of the {items} both rise at the "
        "strength and fall at minus the strength; extract from more examples, or try --methods"
    )


def doubted(vector: SteeringVector, swept: Swept, budget: float) -> SteeringVector:
    """A vector that was extracted for a sweep that recommends nothing: its file says so, beside where to begin."""
    begin = dict(vector.metadata["recommended"])
    begin["reason"] += f"; but a sweep recommends nothing: {why_nothing(swept, budget, anew=True)}"
    return SteeringVector(vector.layers, dict(vector.metadata) | {"recommended": begin})


def _write(folder: Path, report: dict[str, Any], config: Any, inputs: Any, metrics: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT, readable_json(report))
    write_atomically(folder / PAGE, page.html(report, REPORT).encode())
    outputs = {name: digest_file(folder / name) for name in (REPORT, PAGE)}
    runs.RunRecord(
        "sweep", config=config, inputs=inputs, metrics=metrics, outputs=outputs, details={"digest": report["digest"]},
        environment=runs.environment("torch", "transformers"),
    ).write(folder)  # fmt: skip
