"""Whether an arm may be promoted, and how it is served or baked from then on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Engine

from steer.experiments.reporting.report import report
from steer.experiments.specification import Arm, Experiment
from steer.experiments.statistics.decision import Decision, State
from steer.store import layout, names, referrers, refs
from steer.store.history.walk import ancestors
from steer.store.layout import Store
from steer.store.objects.model import read_commit
from steer.store.using import promote as promoting
from vectors.errors import OutputError
from vectors.storage.files import canonical_json


class Moved(NamedTuple):
    """An alias of the store, the commit that it points to now, and the one before."""

    alias: str
    commit: str
    before: str | None


def decision_of(engine: Engine, experiment: Experiment, version: int, arm: Arm) -> Decision:
    """The report's decision about an arm; about the control, that of its health alone. Raises SQLAlchemyError."""
    found = report(engine, experiment, version)
    if found["allocation"] is not None:
        return _of_selection(found["allocation"], arm.name)
    if arm.name in found["decisions"]:
        return Decision(**found["decisions"][arm.name])
    healthy = found["sample_ratio"]["healthy"]
    return Decision("keep running", "the control") if healthy else Decision("unhealthy", "the shares are wrong")


def _of_selection(found: Mapping[str, Any], arm: str) -> Decision:
    """The decision about an arm of an experiment with adaptive weights."""
    if found["state"] == "selected":
        return Decision("selected" if found["selected"] == arm else "not selected", found["reason"])
    states: dict[str, State] = {"unhealthy": "unhealthy", "breached": "roll back"}
    return Decision(states.get(found["state"], "not selected"), found["reason"])


def problem_of(decision: Decision, arm: Arm, experiment: Experiment) -> str | None:
    """Why this decision does not allow the arm to be promoted; None where it does."""
    if decision.state in ("ship", "selected") or (arm.plain and decision.state == "keep running"):
        return None
    return f"the experiment {experiment.name} does not decide for {arm.name}: {decision.state} ({decision.reason})"


def lines_of(arm: Arm, experiment: Experiment, model: str, version: str = "") -> list[str]:
    """The commands that serve the arm for all requests, and that bake it into the weights where that is possible.

    `version` is the name in the store that stands for the arm now, if one does.
    """
    folder = experiment.file.parent
    files = {name: experiment.files.get(name, folder / f"{name}.safetensors") for name in arm.vectors}
    # Vectors of the store have no file here: the expression names their version.
    vectors = [f"--vector {shlex.quote(f'{name}={file}')}" for name, file in files.items() if file.is_file()]
    serve = f"steer serve {shlex.quote(model)}"
    if arm.plain:
        return [serve]
    if version and not (arm.system or arm.lora):
        bake = f"steer bake {version} --model {shlex.quote(model)} -o {arm.name}-model/"
        return [f"steer serve {version}", *([] if arm.conditional else [bake])]
    if arm.system:
        return [f"{serve}    # with this system prompt in every request: {shlex.quote(arm.system)}"]
    if arm.lora:
        return [f"{serve} -- --enable-lora --lora-modules {shlex.quote(f'{arm.name}={arm.lora}')}"]
    named = " ".join([*vectors, f"--arm {shlex.quote(f'{arm.name}={arm.written}')}"])
    bake = " ".join(
        [f"steer bake {shlex.quote(arm.written)} --model {shlex.quote(model)}", *vectors, f"-o {arm.name}-model/"]
    )
    # No weights decide while the model runs.
    return [f"{serve} {named}"] if arm.conditional else [f"{serve} {named}", bake]


def move_alias(
    experiment: Experiment, arm: Arm, label: str, command: str, found: Mapping[str, Any], *, force: bool = False
) -> Moved | None:
    """Point an alias to the version of the store that an arm is; None for an arm that is none.

    The alias is one of the personality that the file names, or for a digest of the branch that holds the commit. What
    `evals:` of the version asks for must be there, unless `force` is set. `found`, what was decided, is attached
    to the composition. Raises OutputError.
    """
    if not arm.commit:
        return None
    store = layout.require(experiment.file.parent)
    text = arm.written.strip().strip("'\"")
    ref = names.ref_of(store, text)
    known = ref is not None and refs.target(store, refs.branch(ref.name)) is not None
    alias = refs.alias(ref.name if known and ref is not None else _branch(store, arm.commit), label)
    before = refs.target(store, alias)
    problems = [] if force else promoting.missing(store, arm.commit, False)
    if problems:
        raise OutputError(
            problems, f"evaluate it: steer eval {text} --suite SUITE, or promote it nevertheless: --force"
        )
    if before != arm.commit:
        refs.point(store, {alias: arm.commit}, command)
    composition = read_commit(store, arm.commit).composition
    referrers.attach(store, composition, referrers.EXPERIMENT, {"report.json": canonical_json(dict(found)).encode()})
    return Moved(str(alias), arm.commit, before)


def _branch(store: Store, commit: str) -> str:
    """The branch whose history holds a commit, the current one before others."""
    here = refs.current(store)
    branches = {ref.name: digest for ref, digest in refs.every(store).items() if ref.kind == "branch"}
    for name in sorted(branches, key=lambda each: (each != here, each)):
        if commit in ancestors(store, branches[name]):
            return name
    return here
