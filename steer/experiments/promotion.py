"""Whether an arm may be promoted, and how it is served or baked from then on."""

from __future__ import annotations

import shlex
from pathlib import Path

from sqlalchemy import Engine

from steer.experiments.specification import Arm, Experiment
from steer.experiments.statistics.decision import Decision, decide
from steer.experiments.statistics.moments import Sums, mean
from steer.experiments.statistics.sample_ratio import THRESHOLD, mismatch_p
from steer.experiments.statistics.sequences import difference
from steer.experiments.storage import figures, state

_NONE = Sums(0, 0.0, 0.0)


def decision_of(engine: Engine, experiment: Experiment, version: int, arm: Arm) -> Decision:
    """The decision about an arm against the control on the primary metric. Raises SQLAlchemyError."""
    metric, units = experiment.metric, figures.units(engine, experiment.name, version)
    p = mismatch_p(units.by_arm, {one.name: one.weight for one in experiment.arms})
    sums = figures.sums(engine, experiment.name, version, metric)
    compared = difference(mean(sums.get(experiment.control.name, _NONE)), mean(sums.get(arm.name, _NONE)))
    stopped = state.state_of(engine, experiment.name, version).stopped
    return decide(
        compared,
        metric.smallest_effect or 0.0,
        higher_is_better=metric.better == "higher",
        unhealthy=(f"the shares of the arms are not those of the file (p = {p:.2g})",) if p < THRESHOLD else (),
        breached=(stopped,) if f"arm {arm.name} is outside" in stopped else (),
    )


def problem_of(decision: Decision, arm: Arm, experiment: Experiment) -> str | None:
    """Why this decision does not allow the arm to be promoted; None where it does."""
    if decision.state == "ship" or (arm.plain and decision.state != "unhealthy"):
        return None
    return f"the experiment {experiment.name} does not decide for {arm.name}: {decision.state} ({decision.reason})"


def lines_of(arm: Arm, experiment: Experiment, model: str) -> list[str]:
    """The commands that serve the arm for all requests, and that bake it into the weights where that is possible."""
    folder = experiment.file.parent
    vectors = [f"--vector {shlex.quote(f'{name}={_file(experiment, folder, name)}')}" for name in arm.vectors]
    serve = f"steer serve {shlex.quote(model)}"
    if arm.plain:
        return [serve]
    if arm.system:
        return [f"{serve}    # with this system prompt in every request: {shlex.quote(arm.system)}"]
    if arm.lora:
        return [f"{serve} -- --enable-lora --lora-modules {shlex.quote(f'{arm.name}={arm.lora}')}"]
    named = " ".join([*vectors, f"--arm {shlex.quote(f'{arm.name}={arm.steer}')}"])
    bake = f"steer bake {shlex.quote(arm.steer)} --model {shlex.quote(model)} {' '.join(vectors)} -o {arm.name}-model/"
    return [f"{serve} {named}", bake]


def _file(experiment: Experiment, folder: Path, name: str) -> Path:
    return experiment.files.get(name, folder / f"{name}.safetensors")
