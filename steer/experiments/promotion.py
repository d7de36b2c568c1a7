"""Whether an arm may be promoted, and how it is served or baked from then on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine

from steer.experiments.reporting.report import report
from steer.experiments.specification import Arm, Experiment
from steer.experiments.statistics.decision import Decision, State
from steer.store import layout, names, referrers, refs
from steer.store.history.walk import ancestors
from steer.store.layout import Store
from steer.store.objects.model import read_commit, read_composition
from steer.store.using import promote as promoting
from vectors.errors import OutputError
from vectors.storage.files import canonical_json


class Moved(NamedTuple):
    """An alias of the store, the commit that it points to now, and the one before; the model that a version is made
    for, and the folder in which commands find it."""

    alias: str
    commit: str
    before: str | None
    base: str
    folder: str


def decision_of(engine: Engine, experiment: Experiment, version: int, arm: Arm) -> Decision:
    """The report's decision about an arm; about the control, which is selected where the experiment is healthy and has
    decided against every other arm. Raises SQLAlchemyError."""
    found = report(engine, experiment, version)
    if found["allocation"] is not None:
        return _of_selection(found["allocation"], arm.name)
    if arm.name in found["decisions"]:
        return Decision(**found["decisions"][arm.name])
    if not found["sample_ratio"]["healthy"]:
        return Decision("unhealthy", "the shares are wrong")
    better = [name for name, each in found["decisions"].items() if each["state"] == "ship"]
    if better:
        return Decision("not selected", f"better than the control: {', '.join(better)}")
    undecided = [name for name, each in found["decisions"].items() if each["state"] == "keep running"]
    if undecided:
        return Decision("keep running", f"undecided: {', '.join(undecided)}")
    return Decision("selected", "no arm is better than the control")


def _of_selection(found: Mapping[str, Any], arm: str) -> Decision:
    """The decision about an arm of an experiment with adaptive weights."""
    if found["state"] == "selected":
        return Decision("selected" if found["selected"] == arm else "not selected", found["reason"])
    states: dict[str, State] = {"unhealthy": "unhealthy", "breached": "roll back"}
    return Decision(states.get(found["state"], "not selected"), found["reason"])


def problem_of(decision: Decision, arm: Arm, experiment: Experiment) -> str | None:
    """Why this decision does not allow the arm to be promoted; None where it does."""
    if decision.state in ("ship", "selected"):
        return None
    return f"the experiment {experiment.name} does not decide for {arm.name}: {decision.state} ({decision.reason})"


def lines_of(
    arm: Arm, experiment: Experiment, model: str, moved: Moved | None = None, rank: int = 0
) -> list[str]:  # fmt: skip
    """The commands that serve the arm with all its parts, and that bake its steering where that is possible.

    `moved` is the alias of the store that stands for the arm now, if one does; `rank` that of its adapter, as vLLM
    takes it. What a command can't do is behind it, as a comment.
    """
    version, enter = ("", "") if moved is None else (moved.alias, _enter(Path(moved.folder)))
    other = moved is not None and model != moved.base  # a version alone is served on the model that it is made for
    if enter and Path(model).is_dir():
        model = str(Path(model).absolute())
    folder = experiment.file.parent
    files = {name: experiment.files.get(name, folder / f"{name}.safetensors") for name in arm.vectors}
    # Vectors of the store have no file here: the expression names their version.
    vectors = [f"--vector {shlex.quote(f'{name}={file}')}" for name, file in files.items() if file.is_file()]
    serve, steered = ["steer serve", shlex.quote(model) if other or not version else version], arm.name
    if other:
        serve += ["--arm", shlex.quote(f"{arm.name}='{version}'")]
    elif version:
        steered = version.rpartition("@")[2]
    elif arm.steer:
        serve += [*vectors, f"--arm {shlex.quote(f'{arm.name}={arm.written}')}"]
    if arm.lora:
        module = json.dumps({"name": arm.name, "path": arm.lora}, ensure_ascii=False)
        serve.append(f"-- --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(module)}")
    called = f"{arm.name}:{steered}" if arm.steer else arm.name  # else the adapter is not steered
    # On one line: the next one of a prompt would be a command of its own.
    prompt = f"the system prompt {json.dumps(arm.system, ensure_ascii=False)}" if arm.system else ""
    asked = [f"the model {called}"] if arm.lora else []
    lines = [enter + _commented(serve, "every request needs ", [*asked, *([prompt] if prompt else [])])]
    # No weights decide while the model runs; an adapter was made for weights that are not baked.
    if arm.steer and not arm.conditional and not arm.lora:
        what = [version] if version else [shlex.quote(arm.written)]
        bake = ["steer bake", *what, f"--model {shlex.quote(model)}", *([] if version else vectors)]
        bake.append(f"-o {shlex.quote(f'{arm.name}-model/')}")
        lines.append(enter + _commented(bake, "served with ", [prompt] if prompt else []))
    return lines


def _enter(folder: Path) -> str:
    """What changes into the folder of a store, where the shell is not in it."""
    return "" if folder.resolve() == Path.cwd().resolve() else f"cd {shlex.quote(str(folder))} && "


def _commented(command: Sequence[str], begins: str, comments: Sequence[str]) -> str:
    return " ".join(command) + (f"    # {begins}{' and '.join(comments)}" if comments else "")


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
    base = read_composition(store, composition).base
    referrers.attach(store, composition, referrers.EXPERIMENT, {"report.json": canonical_json(dict(found)).encode()})
    return Moved(str(alias), arm.commit, before, base, str(store.work.absolute()))


def _branch(store: Store, commit: str) -> str:
    """The branch whose history holds a commit, the current one before others."""
    here = refs.current(store)
    branches = {ref.name: digest for ref, digest in refs.every(store).items() if ref.kind == "branch"}
    for name in sorted(branches, key=lambda each: (each != here, each)):
        if commit in ancestors(store, branches[name]):
            return name
    return here
