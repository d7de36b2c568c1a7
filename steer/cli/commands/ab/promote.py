"""`steer ab promote`: decide for an arm, and print what serves or bakes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests, versions
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.errors import SteerError, UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named):
    """The arguments and options of `steer ab promote`."""

    arm: str = option(help="The arm to promote.", argument=True)
    to: str = option("champion", help="The alias that moves, where the arm is a version of the store.", metavar="ALIAS")
    force: bool = option(False, help="Promote also where the experiment is unhealthy or undecided.")
    model: str = option("", help="The model that serves it: " + options.A_MODEL, complete="models")


@options.command(
    "promote",
    summary="Promote an arm that has won, and print the command that serves or bakes it.",
    examples="""
    steer ab promote tone friendly
    steer ab promote tone friendly --force
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Promote an arm that has won, and print the command that serves or bakes it.

    Refused where the experiment is unhealthy or has not decided, unless --force is given. The log notes it. Where the
    arm is a version of the store, its alias moves there (steer undo takes it back), and the decision is attached to it.
    """
    from steer.experiments import document, promotion
    from steer.experiments.storage import state
    from steer.experiments.storage.database import write
    from steer.serving.lora import lora_rank

    request = requests.build(Request, values)
    experiment = document.read(document.find(request.experiment))
    arm = experiment.arm(request.arm)
    if arm is None:
        names = ", ".join(one.name for one in experiment.arms)
        raise UsageError(f"the experiment {experiment.name} has no arm {request.arm!r}", f"its arms: {names}")
    with _log.opened(request.experiment) as log:
        version = state.version_of(log.engine, experiment.name, experiment.digest)
        if version is None:
            raise UsageError(
                f"the experiment {experiment.name} was not served as {experiment.file} has it now",
                "undo the edit, or serve it",
            )
        decision = promotion.decision_of(log.engine, experiment, version, arm)
        problem = promotion.problem_of(decision, arm, experiment)
        if problem is not None and not request.force:
            first = "wait for the decision" if decision.state == "keep running" else "`steer ab report` says why"
            raise SteerError(problem, f"{first}; promote it nevertheless: --force")
        reason = f"{arm.name}: {decision.state}" + (" (forced)" if problem else "")
        found = {"experiment": experiment.name, "version": version, "arm": arm.name, "digest": arm.digest}
        found |= {"decision": decision.state, "reason": decision.reason, "forced": bool(problem)}
        moved = promotion.move_alias(
            experiment, arm, request.to, versions.typed(), {**found, "experiment_digest": experiment.digest},
            force=request.force,
        )  # fmt: skip
        if moved is not None:
            reason += f"; {moved.alias} is {moved.commit[7:15]}"
        write(log.engine, [("events", state.event(experiment.name, version, state.PROMOTED, reason=reason))])
    model = experiment.model or request.model or ("MODEL" if moved is None else moved.base)
    rank = lora_rank([Path(arm.lora)]) if arm.lora else 0
    lines = promotion.lines_of(arm, experiment, model, moved, rank)
    alias = None if moved is None else {"alias": moved.alias, "commit": moved.commit, "before": moved.before}
    data = {**found, "commands": lines, "alias": alias}
    out.result(data, lambda: out.line("\n".join(lines)))
    if moved is not None:
        before = f", before it was {moved.before[7:15]}" if moved.before not in (None, moved.commit) else ""
        out.say(f"{moved.alias} is {moved.commit[7:15]}{before}")
    out.say(f"promoted {arm.name}: {decision.state} ({decision.reason})")
