"""What differs in behaviour between two versions, by the evaluations that are attached to them.

An evaluation is attached with the figure of every test item (`items.json`), so that two versions which were evaluated
on the same items are compared in pairs, whenever each was evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from steer.store import blobs, referrers
from steer.store.layout import Store
from vectors.documents import json_text
from vectors.documents.schema import list_of, mapping_of, number, optional, problems_of, record, text, whole
from vectors.errors import ArtifactError, SteerError
from vectors.storage.files import digest_json

if TYPE_CHECKING:
    from probes.statistics.paired import Difference
    from steer.evaluation.evaluation import Evaluation

ITEMS = "items.json"
SCHEMA = 1

_ITEM = record({"item": text(longest=100), "metric": text(longest=100)}, {"group": optional(text(longest=10_000))})
_ITEMS = record(
    {
        "schema": whole(SCHEMA, SCHEMA), "suite": text(longest=10_000), "digests": mapping_of(text(longest=200)),
        "model": text(longest=200), "items": list_of(_ITEM), "base": list_of(number), "subject": list_of(number),
    }
)  # fmt: skip


class Evaluated(NamedTuple):
    """An evaluation of a version: by item (a digest) the metric, the group, and the figures of base and version."""

    suite: str
    digests: Mapping[str, str]  # of the suite's files
    key: str  # of the suite's files and the model: evaluations with one key are comparable
    outcome: str
    metrics: Mapping[str, str]
    groups: Mapping[str, str]
    base: Mapping[str, float]
    subject: Mapping[str, float]


class Compared(NamedTuple):
    """One metric of one suite: the effect of each side on the shared items, and the paired change between them.

    Without shared items `change` is None, and so are the effects of a side that was not evaluated.
    """

    suite: str
    metric: str
    before: Difference | None
    after: Difference | None
    change: Difference | None
    outcomes: tuple[str, str]

    def sentence(self) -> str:
        """What the interval says."""
        from probes.statistics.verdict import too_few_to_say

        if self.change is None:
            return "not comparable: no items that both were evaluated on"
        too_few = too_few_to_say(self.change.items, self.change.clusters)
        if too_few:
            return f"no verdict: {too_few}"
        if self.change.low > 0:
            return "more of the behaviour"
        return "less of the behaviour" if self.change.high < 0 else "no difference shown"


def value_of(compared: Compared) -> dict[str, Any]:
    """A comparison as JSON."""
    figures = {key: getattr(compared, key) for key in ("before", "after", "change")}
    return {
        "suite": compared.suite, "metric": compared.metric, "outcomes": list(compared.outcomes),
        **{key: None if each is None else each._asdict() for key, each in figures.items()},
        "sentence": compared.sentence(),
    }  # fmt: skip


def items_of(evaluation: Evaluation, subject: str) -> bytes:
    """The figures of one subject on every test item, as `items.json`; each answer counts equally in their means."""
    from steer.evaluation.judgement import metrics_of
    from steer.evaluation.suites.sides import identifier

    inputs, names = evaluation.inputs, list(evaluation.arms)
    metrics = metrics_of(inputs.test)
    metric_of = {column: metric.name for metric in metrics for column in metric.columns}
    figures = evaluation.figures.clone()
    for metric in metrics:
        figures[:, metric.columns] = metric.of(evaluation.figures)
    arm = next(each.plan.subject.arm.name for each in evaluation.subjects if each.plan.subject.name == subject)
    items = [
        {"item": identifier(item), "metric": metric_of[column], "group": item.group or None}
        for column, item in enumerate(inputs.test)
    ]
    value = {
        "schema": SCHEMA, "suite": inputs.suite.name, "digests": dict(inputs.suite.digests),
        "model": evaluation.model.identity["digest"], "items": items,
        "base": figures[names.index("base")].tolist(),
        "subject": figures[names.index(arm)].tolist(),
    }  # fmt: skip
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def evaluations_of(store: Store, composition: str) -> list[Evaluated]:
    """The evaluations of a composition that hold the figures of items, the newest last. Raises ArtifactError."""
    found = []
    for each in referrers.of(store, composition, referrers.EVALUATION):
        if ITEMS in each.files:
            report = referrers.read_report(store, each)
            subjects = report.get("subjects")
            outcome = subjects[0].get("outcome") if isinstance(subjects, list) and subjects else ""
            found.append(_evaluated(store, each.files[ITEMS], str(outcome)))
    return found


def compare(store: Store, before: str, after: str, *, seed: int = 0) -> list[Compared]:
    """The newest evaluations of two compositions, suite by suite and metric by metric. Raises ArtifactError."""
    sides = [{each.key: each for each in evaluations_of(store, digest)} for digest in (before, after)]
    compared = []
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = sides[0].get(key), sides[1].get(key)
        either = b or a
        assert either is not None
        for metric in dict.fromkeys(either.metrics.values()):
            compared.append(_compared(a, b, either, metric, seed))
    return compared


def effect(evaluated: Evaluated, metric: str | None = None, *, seed: int = 0) -> Difference:
    """The change from the base on all items of a metric, by default that of the first item."""
    metric = metric or next(iter(evaluated.metrics.values()))
    items = [item for item, each in evaluated.metrics.items() if each == metric]
    return _difference(evaluated, items, [evaluated.subject[item] - evaluated.base[item] for item in items], seed)


def evaluations_if_whole(store: Store, composition: str) -> list[Evaluated]:
    """The evaluations of a composition, or none where one is damaged, which `steer verify` names."""
    try:
        return evaluations_of(store, composition)
    except SteerError:
        return []


def means(evaluated: Sequence[Evaluated], of_parent: Sequence[Evaluated]) -> list[str]:
    """A line for each suite that a version was evaluated on: its effect, and the change from its parent, as means.

    It needs no torch, so that the history is fast; the intervals are those of `compare`.
    """
    now, before = ({each.key: each for each in side} for side in (evaluated, of_parent))
    lines = []
    for key, each in now.items():
        for metric in dict.fromkeys(each.metrics.values()):
            items = [item for item, its in each.metrics.items() if its == metric]
            text = f"evaluated on {each.suite}: {metric} {_mean(each.subject, each.base, items):+.3f}"
            other = before.get(key)
            shared = [item for item in items if other and item in other.subject]
            if other and shared:
                text += f", {_mean(each.subject, other.subject, shared):+.3f} from the version before"
            lines.append(text + (f" ({each.outcome})" if each.outcome else ""))
    return lines


def _mean(after: Mapping[str, float], before: Mapping[str, float], items: Sequence[str]) -> float:
    return sum(after[item] - before[item] for item in items) / len(items)


def _compared(a: Evaluated | None, b: Evaluated | None, either: Evaluated, metric: str, seed: int) -> Compared:
    outcomes = (a.outcome if a else "", b.outcome if b else "")
    items = [item for item, each in either.metrics.items() if each == metric]
    shared = [item for item in items if a and b and item in a.subject and item in b.subject]
    change = None
    if a and b and shared:
        change = _difference(b, shared, [b.subject[item] - a.subject[item] for item in shared], seed)

    def side(each: Evaluated | None) -> Difference | None:
        if each is None:
            return None
        among = shared or [item for item in items if item in each.subject]
        return _difference(each, among, [each.subject[item] - each.base[item] for item in among], seed)

    return Compared(either.suite, metric, side(a), side(b), change, outcomes)


def _difference(evaluated: Evaluated, items: Sequence[str], values: Sequence[float], seed: int) -> Difference:
    import torch

    from probes.statistics.paired import difference

    named = [evaluated.groups.get(item, "") for item in items]
    groups = [group or item for group, item in zip(named, items, strict=True)] if any(named) else None
    return difference(torch.tensor(values, dtype=torch.float64), groups, seed=seed)


def _evaluated(store: Store, digest: str, outcome: str) -> Evaluated:
    try:
        value: Any = json_text.parse(blobs.read(store, digest, referrers.LARGEST))
    except ValueError as error:
        raise ArtifactError(f"the figures {digest} are damaged: {error}", "evaluate again") from error
    problems = problems_of(value, _ITEMS)
    if not problems and not len(value["items"]) == len(value["base"]) == len(value["subject"]):
        problems = ["it has not as many figures as items"]
    if problems:
        raise ArtifactError([f"the figures {digest}: {problem}" for problem in problems], "evaluate again")
    names = [item["item"] for item in value["items"]]
    return Evaluated(
        value["suite"], value["digests"], digest_json([value["digests"], value["model"]]), outcome,
        {item["item"]: item["metric"] for item in value["items"]},
        {item["item"]: item["group"] for item in value["items"] if item.get("group")},
        dict(zip(names, value["base"], strict=True)), dict(zip(names, value["subject"], strict=True)),
    )  # fmt: skip
