"""Which arm a unit gets: a pure function of the salt and the unit, so that every server and every restart agree.

Two fractions of one unit decide, each a SHA-256 of canonical JSON: whether the unit takes part (below the coverage),
and which arm it has (cumulative weights). Since the second does not depend on the coverage, a growing coverage adds
units and moves none. Another salt gives independent fractions, so two experiments do not influence each other; those
of one server must have different ones (`require_apart`).
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

from steer.experiments.specification import Arm, Experiment, Namespace
from vectors.errors import UsageError

OUTSIDE, ASSIGNED = "outside", "assigned"


class Assignment(NamedTuple):
    """The arm of a unit, by name, and why: `assigned` by its fraction, or `outside` the experiment (the control)."""

    arm: str
    reason: str


class Identity(NamedTuple):
    """Who sends a request: the unit and the conversation as the client gives them, and what the unit was found by.

    `begins` is true where the conversation is known by its first message alone and has no answer yet: then it begins.
    """

    unit: str
    source: str  # user, header, conversation, or first message
    conversation: str
    begins: bool
    previous: str = ""  # the id of the response that the request continues, where it says so


class Decision(NamedTuple):
    """What a request gets: the arm and why, and how it is recorded (see the columns of the exposures)."""

    arm: Arm
    reason: str
    version: int
    stage: int
    counted: bool
    unit: str
    source: str
    conversation: str
    epoch: int | None = None


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on these texts alone: the first 53 bits of the SHA-256 of their JSON list."""
    return float((int.from_bytes(_sha256(*parts).digest()[:8], "big") >> 11) / 2**53)


def assign(
    experiment: Experiment, unit: str, coverage: float, weights: Mapping[str, float] | None = None
) -> Assignment:
    """The arm of a unit while an experiment covers this share of the units.

    `weights` are by arm, those of the file by default. A unit keeps its arm where weights stay; where they change,
    whoever assigns must remember it (`running.adaptive`).
    """
    space = experiment.namespace
    if space is not None and not space.start <= fraction("namespace", space.name, unit) < space.end:
        return Assignment(experiment.control.name, OUTSIDE)
    if not fraction("coverage", experiment.salt, unit) < coverage:
        return Assignment(experiment.control.name, OUTSIDE)
    position, cumulative = fraction("arm", experiment.salt, unit), 0.0
    for arm in experiment.arms:
        cumulative += arm.weight if weights is None else weights[arm.name]
        if position < cumulative:
            return Assignment(arm.name, ASSIGNED)
    return Assignment(next(arm.name for arm in reversed(experiment.arms) if arm.weight > 0), ASSIGNED)


def require_apart(experiments: Sequence[Experiment]) -> None:
    """Raise UsageError where experiments would influence each other, with every problem.

    With one salt, a unit has the same fractions in both, so that the effects of their arms can't be told apart. Two
    experiments of one name are another problem, which is left out here.
    """
    problems, hints = [], []
    for one, two in itertools.combinations(experiments, 2):
        if one.name == two.name:
            continue
        both = f"the experiments {one.name} and {two.name}"
        if one.salt == two.salt:
            problems.append(f"{both} have the same salt: whoever gets the first arm of one gets that of the other")
            hints.append(f"write in {two.file}: salt: {two.name}-{secrets.token_hex(8)}")
        first, second = one.namespace, two.namespace
        if first is None or second is None or first.name != second.name:
            continue
        shared = f"{both} share the namespace {first.name}"
        if max(first.start, second.start) < min(first.end, second.end):
            problems.append(f"{shared}, and their ranges overlap: {_range(first)} and {_range(second)}")
            hints.append(
                "give the experiments of a namespace ranges that do not overlap, such as [0, 0.5] and [0.5, 1]"
            )
        if one.unit != two.unit:
            problems.append(f"{shared}, and have different units, {one.unit} and {two.unit}: both may get one user")
            hints.append("give the experiments of a namespace the same unit")
    if problems:
        raise UsageError(problems, "; ".join(dict.fromkeys(hints)))


def _range(space: Namespace) -> str:
    return f"[{space.start:g}, {space.end:g}]"


def hashed(salt: str, unit: str, kind: str = "unit") -> str:
    """The salted hash under which a unit (or a `kind` of its own, such as a conversation) stands in the log."""
    return _sha256(kind, salt, unit).hexdigest()[:32]


def _sha256(*parts: str) -> hashlib._Hash:
    """The hash of the canonical JSON of a list of texts, which every request needs several times."""
    return hashlib.sha256(f"[{','.join(map(encode_basestring, parts))}]".encode("utf-8", "surrogatepass"))
