"""`steer eval`: whether a behaviour works, against controls on the same items, and what it costs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests, versions
from steer.cli.output import out
from steer.evaluation.request import Request
from vectors.errors import SteerError, collecting

if TYPE_CHECKING:
    from steer.evaluation.measuring.engine import Through


@options.command(
    summary="Measure whether a vector, a prompt or a baked model shows a behaviour, against controls.",
    examples="""
    steer eval warm.safetensors --pos warm-test.jsonl --neg cold-test.jsonl
    steer eval warm "0.5*warm" prompt:"Answer warmly." --suite warmth.yaml --out warmth-eval
    steer eval tone@challenger tone@champion --suite warmth.yaml
    steer eval ./warm-model --suite warmth.yaml --prompt "Answer warmly." --json
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Measure subjects on the same test items as their controls, in pairs, and give a verdict for each.

    Items come from --suite, or from files of examples; a third of them, by a hash of their content, is for development
    and never enters the verdict. A subject works if it beats the base, its negation, and vectors from shuffled labels
    and random directions, by intervals of paired differences with Holm's correction; under 30 items there is none.
    """
    request, of_versions = _request(values)
    from steer.cli.output import say_preparing
    from steer.evaluation.api import evaluate_request
    from steer.evaluation.report import report

    if request.model is not None:
        say_preparing(request.model)
    with out.progress() as on_event:
        evaluation = evaluate_request(request, through=_through(request), on_event=on_event)
    value = report(evaluation)
    versions.attach_evaluation(of_versions, evaluation, value)
    out.result(value, lambda: _print(value, request.out))


def _request(values: Mapping[str, Any]) -> tuple[Request, dict[str, str]]:
    """The request, and its versions as of `versions.with_versions`. Raises SteerError with all problems of the options
    and, where there are any, of what they name."""
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    of_versions: dict[str, str] = {}
    with collecting(errors):
        request, of_versions = versions.with_versions(request)
    if errors:
        from steer.evaluation.api import require_right

        require_right(request, errors)
    return request, of_versions


def _through(request: Request) -> Through | None:
    """The engine of a request; None for hooks in transformers."""
    if request.engine == "transformers":
        return None
    from steer.serving.offline.arms import through_vllm

    return through_vllm


def _print(value: dict[str, Any], folder: Path | None) -> None:
    from steer.reports.evaluation import against_prompt, arm_rows, other_behaviours, text_rows
    from steer.reports.text_scores import score_tables, validity

    header, rows = arm_rows(value)
    out.table(header, rows, 1)
    header, rows = text_rows(value)
    if rows:
        out.line()
        out.table(header, rows, 1)
    for header, rows in score_tables(value):
        out.line()
        out.table(header, rows, 2)
    for sentence in validity(value):
        out.line(sentence)
    for subject in value["subjects"]:
        out.line(f"\n{subject['sentence']}")
        if subject["kind"] == "composition":
            point = subject["operating_point"]
            out.line(f"operating point: {point['expression']} ({point['from']})")
        for metric in subject["metrics"]:
            slopes = metric["slopes"]
            if slopes:
                out.line(
                    f"{slopes['anti_steered']:.0%} of the items go the wrong way "
                    f"({slopes['anti_steered_low']:.0%} to {slopes['anti_steered_high']:.0%}, {metric['metric']})"
                )
            for sentence in against_prompt(metric):
                out.line(sentence)
        for sentence in other_behaviours(subject):
            out.line(sentence)
    for sentence in value["overlap"]:
        out.warn(sentence)
    for note in value["notes"]:
        out.say(note)
    if folder is not None:
        out.line(f"wrote {folder}/report.html")
