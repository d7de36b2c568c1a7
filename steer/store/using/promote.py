"""Moving an alias, such as champion, to a version that has earned it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.store import names, referrers, refs
from steer.store.layout import Store
from steer.store.objects.model import read_commit, read_composition
from steer.store.refs import Ref
from vectors.errors import OutputError, UsageError


def promote(
    store: Store, version: str, label: str, command: str, *, require_eval: bool = False, force: bool = False
) -> tuple[Ref, str, str | None]:
    """Point an alias of a personality to a version; returns the alias, the commit and where the alias was before.

    What `evals:` of the version lists must be met by an evaluation that is attached to it, and with `require_eval`
    there must be one that says "works". Raises OutputError with everything that is missing, unless `force` is set.
    """
    digest = names.resolve(store, version)
    ref = names.ref_of(store, version)
    name = ref.name if ref is not None and refs.target(store, refs.branch(ref.name)) else refs.current(store)
    alias = refs.alias(name, label)
    problems = [] if force else missing(store, digest, require_eval)
    if problems:
        raise OutputError(
            problems, f"evaluate it: steer eval {version} --suite SUITE, or promote it nevertheless: --force"
        )
    before = refs.target(store, alias)
    if before == digest:
        raise UsageError(f"{alias} is {names.short(digest)} already", "steer log shows the aliases")
    refs.point(store, {alias: digest}, command)
    return alias, digest, before


def missing(store: Store, digest: str, require_eval: bool) -> list[str]:
    """What a version lacks for a promotion: one sentence each."""
    commit = read_commit(store, digest)
    reports = [
        referrers.read_report(store, each) for each in referrers.of(store, commit.composition, referrers.EVALUATION)
    ]
    problems = []
    if require_eval and not any(_works(report) for report in reports):
        problems.append(
            "no evaluation is attached to it" if not reports else "none of its evaluations says that it works"
        )
    for wanted in read_composition(store, commit.composition).evals:
        suite = str(wanted["suite"])
        matching = [report for report in reports if _is_of(report, suite)]
        if not matching:
            problems.append(f"there is no evaluation on the suite {suite}")
            continue
        minimum = wanted.get("minimum")
        if minimum is None:
            if not any(_works(report) for report in matching):
                problems.append(f"no evaluation on the suite {suite} says that it works")
            continue
        lows = [low for report in matching for low in _lower_ends(report, wanted.get("metric"))]
        if not lows or max(lows) < float(minimum):
            best = f"at best {max(lows):.3g}" if lows else "not measured"
            problems.append(f"the effect on the suite {suite} must be at least {minimum:g}: its interval begins {best}")
    return problems


def _works(report: Mapping[str, Any]) -> bool:
    return any(isinstance(each, dict) and each.get("outcome") == "works" for each in report.get("subjects") or [])


def _is_of(report: Mapping[str, Any], suite: str) -> bool:
    described = report.get("suite") or {}
    stem = suite.rpartition("/")[2]
    return suite in (described.get("digests") or {}).values() or described.get("name") in (
        suite, stem, stem.rpartition(".")[0],
    )  # fmt: skip


def _lower_ends(report: Mapping[str, Any], metric: Any) -> list[float]:
    """The lower ends of the intervals of the subjects' effects, which are changes from the base."""
    found = []
    for subject in report.get("subjects") or []:
        for each in subject.get("metrics") or []:
            if metric in (None, each.get("metric")):
                low = (each.get("effect") or {}).get("low")
                if isinstance(low, int | float):
                    found.append(float(low))
    return found
