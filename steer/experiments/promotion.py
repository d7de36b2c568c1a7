"""Whether an arm may be promoted, and how it is served or baked from then on."""

from __future__ import annotations

import shlex
from pathlib import Path

from sqlalchemy import Engine

from steer.experiments.reporting.report import report
from steer.experiments.specification import Arm, Experiment
from steer.experiments.statistics.decision import Decision


def decision_of(engine: Engine, experiment: Experiment, version: int, arm: Arm) -> Decision:
    """The report's decision about an arm; about the control, that of its health alone. Raises SQLAlchemyError."""
    found = report(engine, experiment, version)
    if arm.name in found["decisions"]:
        return Decision(**found["decisions"][arm.name])
    healthy = found["sample_ratio"]["healthy"]
    return Decision("keep running", "the control") if healthy else Decision("unhealthy", "the shares are wrong")


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
