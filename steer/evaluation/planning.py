"""The arms of an evaluation: for each subject its controls in families, its prompt baselines, and its curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from probes.data.examples import Example
from probes.data.reading import Contrast
from probes.directions.shuffled import shuffled_directions
from probes.models.loading import LoadedModel
from probes.seeds import child_seed
from steer.evaluation.arms import controls
from steer.evaluation.arms.arm import BASE, Arm
from steer.evaluation.arms.subjects import Subject
from steer.evaluation.measuring.divergences import summary
from steer.evaluation.measuring.equal_divergence import Measure, at_divergence
from steer.evaluation.suites.items import Choice, Item, Pair
from vectors.errors import ExpressionError, SteerError
from vectors.events import OnEvent, ignore
from vectors.steering import SteeringVector

SHUFFLES = 2  # times as many draws of shuffled labels: of all families their effects lie the farthest apart
SCALED = ("adapter", "task-vector")  # kinds of subjects in the weights that a factor scales
SHUFFLED_FROM = 100  # most development items that labels are shuffled of


@dataclass(frozen=True)
class Plan:
    """The arms of one subject. `controls` are what it must beat, by family; `others` are compared for information,
    `opposite` among them: the subject with the opposite sign, where it is no control.

    `curve` are the arms of the curve by factor, the base at 0; `notes` say which controls do not apply, and why.
    """

    subject: Subject
    controls: Mapping[str, list[Arm]]
    others: Mapping[str, Arm] = field(default_factory=dict)
    curve: Mapping[float, Arm] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def negation(self) -> Arm | None:
        """The subject with the opposite sign, a control or not; None for one that can't be scaled."""
        return self.controls["negation"][0] if "negation" in self.controls else self.others.get("opposite")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which controls are wanted, and what they are made from."""

    names: Sequence[str]  # of `controls.CONTROLS`; empty for all that apply
    draws: int
    prompt: str | None
    donor: tuple[str, SteeringVector] | None
    shuffled_from: Contrast | None
    factors: Sequence[float]
    seed: int

    def has(self, name: str) -> bool:
        """Whether a control is wanted."""
        return not self.names or name in self.names


def plan_of(
    loaded: LoadedModel,
    subject: Subject,
    wanted: Wanted,
    states: Mapping[int, Tensor],
    measure: Measure,
    *,
    on_event: OnEvent = ignore,
) -> Plan:
    """The arms of a subject. `states` [tokens, hidden] by layer are the base's on neutral text, `measure` its KL there.

    Raises as `probes.directions.extraction.extract` does, ArtifactError for a donor that lacks a layer.
    """
    arm = subject.arm
    families: dict[str, list[Arm]] = {BASE: [Arm(BASE)]}
    others: dict[str, Arm] = {}
    notes: list[str] = []
    if arm.composition is not None:
        _add_vector_controls(families, notes, loaded, arm, wanted, states, measure, on_event)
    negated = controls.negation(arm) if arm.composition is not None or subject.kind in SCALED else None
    if negated is not None and wanted.has("negation"):
        families["negation"] = [negated]
    elif negated is not None:
        others["opposite"] = negated
        notes.append(f"{negated.name} is measured for the slopes of single items, and is no control")
    elif arm.composition is not None:
        notes.append(f"{arm.name} has no negation, and single items have no slopes: clamp sets a level")
    else:
        notes.append(
            f"{subject.name} is no vector: it is compared with the base alone, and single items have no slopes"
        )
    if wanted.prompt is not None:
        others["prompt"] = Arm(f"prompt: {wanted.prompt}", system=wanted.prompt)
        if arm.system is None:
            others["prompt + subject"] = replace(arm, name=f"prompt + {arm.name}", system=wanted.prompt)
    return Plan(subject, families, others, _curve(arm, wanted.factors), tuple(notes))


def _add_vector_controls(
    families: dict[str, list[Arm]],
    notes: list[str],
    loaded: LoadedModel,
    arm: Arm,
    wanted: Wanted,
    states: Mapping[int, Tensor],
    measure: Measure,
    on_event: OnEvent,
) -> None:
    if wanted.has("shuffled") and wanted.shuffled_from is not None:
        method = next((str(v.metadata.get("method", {}).get("name", "")) for v in arm.vectors.values()), "")
        count = SHUFFLES * wanted.draws * len(arm.vectors)  # an extraction for each vector of a draw
        directions = _shuffled(loaded, wanted, controls.acting_layers(arm), count, method, on_event)
        families["shuffled"] = controls.shuffled_arms(arm, directions, states)
    drawn = controls.random_arms(arm, states, wanted.draws, wanted.seed)
    if wanted.has("random"):
        families["random"] = drawn
    if wanted.has("random-kl"):
        try:
            target = summary(measure([arm])[0]).p95
            families["random-kl"] = [
                replace(scaled, name=f"{each.name}, equal KL")
                for each, (scaled, _) in zip(drawn, at_divergence(drawn, target, measure), strict=True)
            ]
        except ExpressionError:
            notes.append(f"{arm.name} can't be scaled, so no control has its KL")
    if wanted.has("orthogonal"):
        families["orthogonal"] = controls.orthogonal_arms(arm, states, wanted.draws, wanted.seed)
    if wanted.donor is not None:
        name, donor = wanted.donor
        families["donor"] = [controls.donor_arm(arm, donor, name, states)]


def _shuffled(
    loaded: LoadedModel, wanted: Wanted, layers: Sequence[int], count: int, method: str, on_event: OnEvent
) -> list[dict[int, Tensor]]:
    assert wanted.shuffled_from is not None
    arguments = {"count": count, "seed": child_seed(wanted.seed, "shuffled"), "on_event": on_event}
    try:
        return shuffled_directions(loaded, wanted.shuffled_from, layers, method=method or "diffmean", **arguments)  # type: ignore[arg-type]
    except SteerError:  # a vector that another tool made names a method that we do not have
        return shuffled_directions(loaded, wanted.shuffled_from, layers, **arguments)  # type: ignore[arg-type]


def _curve(arm: Arm, factors: Sequence[float]) -> dict[float, Arm]:
    """The arms of the curve, with 0 (its changes are counted from there) and 1; none without factors."""
    if arm.composition is None or not factors:
        return {}
    try:
        return {
            factor: arm.scaled(factor, f"{arm.name} x {factor!r}") if factor else Arm(BASE)
            for factor in sorted({0.0, 1.0, *map(float, factors)})
        }
    except ExpressionError:
        return {}


def contrast_of(items: Sequence[Item]) -> Contrast | None:
    """Development items as contrasting examples, to shuffle their labels; None where there are fewer than 4."""
    positive: list[Example] = []
    negative: list[Example] = []
    for item in items[:SHUFFLED_FROM]:
        if isinstance(item, Pair):
            positive.append(item.positive)
            negative.append(item.negative)
        elif isinstance(item, Choice):
            answers = [Example(option, item.question, origin=item.origin or item.id) for option in item.options]
            positive.append(answers.pop(item.positive))
            negative.append(answers[0])
    return Contrast(positive, negative, False, {}) if len(positive) >= 4 else None
