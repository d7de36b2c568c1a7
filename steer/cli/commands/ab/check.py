"""`steer ab check`: what is wrong with an experiment file, and its digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option

if TYPE_CHECKING:
    from steer.experiments.planning import Plan
    from steer.experiments.specification import Allocation, Experiment


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer ab check`."""

    experiment: str = option(help="The experiment: its file, or NAME for NAME.yaml here.", argument=True)
    model: str = option("", help="The model to compare its vectors with: " + options.A_MODEL, complete="models")


@options.command(
    "check",
    summary="Check an experiment file: all problems at once, and its digest.",
    examples="""
    steer ab check tone.yaml
    steer ab check tone --model smollm2
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Check an experiment file: all problems at once, and its digest.

    Another digest is another version: who edits a running experiment begins a new one.
    """
    from steer.experiments import document
    from steer.experiments.arms import alike
    from steer.experiments.planning import plan

    request = requests.build(Request, values)
    experiment = document.read(document.find(request.experiment), model=request.model or None)
    document.require_salt(experiment)
    planned = plan(experiment)
    data = {"digest": experiment.digest, "steps": list(experiment.steps), "units_needed": planned.units}
    out.result(data | experiment.frozen(), lambda: _print(experiment, planned))
    for names in alike(experiment.arms):
        out.say(f"the arms {' and '.join(names)} do the same, so they differ by chance alone (an A/A comparison)")
    served = experiment.model or request.model or "MODEL"
    if too_high := [step for step in experiment.ramp if step > experiment.coverage]:
        out.say(f"the ramp ends at the coverage of {experiment.coverage:g}, below its step of {too_high[0]:g}")
    out.say(f"next: steer serve {served} --experiment {experiment.file}")


def _print(experiment: Experiment, planned: Plan) -> None:
    from steer.experiments.storage.database import shown

    facts = {
        "experiment": experiment.name,
        "digest": experiment.digest,
        "unit": experiment.unit,
        "coverage": " -> ".join(f"{step:.4g}" for step in experiment.steps),
        "metric": f"{experiment.metric.name} ({experiment.metric.kind}, {experiment.metric.better} is better)",
        "allocation": _allocation(experiment),
        "units": _needed(experiment, planned),
        "guardrails": _guardrails(experiment),
        "log": shown(experiment.log),
    }
    out.line("\n".join(f"{key:12}{value}" for key, value in facts.items() if value))
    out.line()
    rows = [[arm.name, arm.text(), arm.digest[:19], f"{arm.weight:.4g}"] for arm in experiment.arms]
    if experiment.allocation is not None:
        out.line(_meaning(experiment, experiment.allocation))
        out.line()
    out.table(["arm", "what it does", "digest", "weight"], rows, 3)


def _guardrails(experiment: Experiment) -> str:
    """All that are in force: also those that the file does not name."""
    limits = ", ".join(f"{name} {limit:g}" for name, limit in experiment.guardrails.items())
    return f"{limits} (on a breach: {experiment.on_breach})" if limits else "none"


def _allocation(experiment: Experiment) -> str:
    allocation = experiment.allocation
    return "" if allocation is None else f"adaptive ({allocation.method}): selection, not estimation"


def _meaning(experiment: Experiment, allocation: Allocation) -> str:
    """What an adaptive allocation does."""
    from steer.experiments.statistics.sequences import ALPHA, FEWEST

    return (
        f"The weights below are those at the beginning. After {FEWEST} units of each arm they follow the metric, at "
        f"most every\n{allocation.every} s, with at least {allocation.smallest_share:.4g} for each arm, until one is "
        f"selected: none is better by more than {experiment.metric.smallest_effect:g},\nwhich is wrong in at most "
        f"{ALPHA:.0%} of experiments. There is no verdict about effects (ship, roll back)."
    )


def _needed(experiment: Experiment, planned: Plan) -> str:
    from steer.experiments.planning import POWER

    if planned.units is None:
        return f"not known: the file has no {planned.missing}"
    if experiment.allocation is not None:
        return f"about {planned.units:,} to select an arm that is better by {experiment.metric.smallest_effect:g}"
    return f"about {planned.units:,} to see a difference of {experiment.metric.smallest_effect:g} ({POWER:.0%} power)"
