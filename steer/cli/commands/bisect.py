"""`steer bisect`: which version broke a trait, by evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option

if TYPE_CHECKING:
    from steer.store.layout import Store
    from vectors.events import OnEvent


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer bisect`."""

    suite: Path = option(help="The suite of items on which versions are evaluated.", flag="--eval", metavar="SUITE")
    good: str = option(help="A version that has the trait.")
    bad: str = option("HEAD", help="A later version that has lost it.")
    minimum: float | None = option(
        None, help="The least effect that counts as having the trait.",
        default_text="half-way between the effects of the good and of the bad version",
    )  # fmt: skip
    items: int = option(64, help="The most test items.", low=2)


@options.command(
    summary="Find the version that broke a trait, by evaluating few of the versions between.",
    examples="""
    steer bisect --eval warmth.yaml --good tone:v1
    steer bisect --eval warmth.yaml --good tone~12 --bad tone --minimum 0.2
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Search the versions between a good and a bad one for the first that has lost a trait: a binary search.

    Each version is evaluated on the suite without controls, and the evaluation is attached to it. So an interrupted
    search goes on where it was when it is started again, and evaluations that are there already are used.
    """
    request = requests.build(Request, values)
    from steer.store import layout, names
    from steer.store.history import bisect
    from steer.store.names import short
    from steer.store.objects.model import read_commit

    store = layout.require()
    line = bisect.between(store, names.resolve(store, request.good), names.resolve(store, request.bad))
    with out.progress() as on_event:

        def measure(commit: str) -> float:
            figure = _effect(store, commit, request, on_event)
            out.say(f"{short(commit)}  effect {figure:+.3f}  {read_commit(store, commit).title}")
            return figure

        found = bisect.search(line, measure, request.minimum)
    broken = read_commit(store, found.broken)

    def human() -> None:
        out.line(
            f"{short(found.broken)} broke it: effect {found.figures[found.broken]:+.3f}, before it "
            f"{found.figures[found.last_good]:+.3f} (threshold {found.threshold:+.3f})"
        )
        for text in versions.log_lines(store, [broken], versions.names_of(store)):
            out.line(text)
        out.say(
            f"evaluated {len(found.figures)} of {len(line)} versions; take it back: steer revert {short(broken.digest)}"
        )

    out.result(
        {
            "broken": found.broken, "last_good": found.last_good, "threshold": found.threshold,
            "figures": found.figures, "versions": len(line),
        },
        human,
    )  # fmt: skip


def _effect(store: Store, commit: str, request: Request, on_event: OnEvent) -> float:
    """The mean effect of a version on the suite: of an evaluation attached to it, or of a new one."""
    from steer.evaluation.suites.reading import Sources, read_suite
    from steer.store.history import behaviour
    from steer.store.objects.model import STEERING, TASK, read_commit, read_composition

    composition = read_commit(store, commit).composition
    personality = read_composition(store, composition)
    if not personality.parts:
        return 0.0  # the base, from which effects are measured
    digests = read_suite(Sources(suite=request.suite)).digests
    for each in reversed(behaviour.evaluations_of(store, composition)):
        if each.digests == digests and len(each.metrics) <= request.items:
            return behaviour.effect(each).mean
    if not personality.of_kind(TASK):
        _evaluate(commit, None, request, on_event)
    elif not personality.of_kind(STEERING):
        from steer.store.using.realise import build
        from vectors.storage.locks import temporary_folder

        with temporary_folder(store.root / "bisected") as folder:
            build(store, personality, folder / commit[7:15], on_event=on_event)
            _evaluate(str(folder / commit[7:15]), (personality.base, composition), request, on_event)
    else:
        raise UsageError(
            f"{commit[7:15]} changes the weights and steers too, which is not evaluated at once",
            "evaluate its versions by hand: steer build, steer eval, steer attach",
        )
    return behaviour.effect(behaviour.evaluations_of(store, composition)[-1]).mean


def _evaluate(subject: str, weights: tuple[str, str] | None, request: Request, on_event: OnEvent) -> None:
    """Evaluate a version and attach the result. Of one that is built into a folder, `weights` are its base and its
    composition."""
    from steer.evaluation.api import evaluate_request
    from steer.evaluation.report import report
    from steer.evaluation.request import Request as Evaluation

    asked = Evaluation(
        subjects=(subject,), suite=request.suite, items=request.items, control=("none",), curve=(0.0, 1.0),
        max_tokens=0, model=None if weights is None else weights[0],
    )  # fmt: skip
    resolved, of_versions = (asked, {subject: weights[1]}) if weights else versions.with_versions(asked)
    evaluation = evaluate_request(resolved, on_event=on_event)
    versions.attach_evaluation(of_versions, evaluation, report(evaluation))
