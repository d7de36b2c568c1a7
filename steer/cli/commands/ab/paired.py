"""`steer ab paired`: all arms on the same prompts and random numbers, compared prompt by prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.output import out
from steer.experiments.paired.request import Request
from vectors.errors import UsageError

if TYPE_CHECKING:
    from steer.experiments.paired.votes import Ballot

CHOICES = {"1": 1, "2": -1, "t": 0, "q": None}


@options.command(
    "paired",
    summary="Let all arms answer the same prompts, and compare them prompt by prompt.",
    examples="""
    steer ab paired tone --prompts prompts.jsonl
    steer ab paired tone --prompts prompts.jsonl --vote
    steer ab paired tone --prompts prompts.jsonl --judge http://localhost:9000/v1 --judge-model m --concept "warm"
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Let all arms answer the same prompts with the same random numbers, and compare them prompt by prompt.

    With vLLM, all answers are one batch. Length, repetition, refusals, the likelihood of the answers under the
    unsteered model, and scorers are compared by paired differences. Votes between two answers are blind: by --vote
    yours, by --judge a model's. Fewer than 30 prompts give figures and no verdict.
    """
    request = requests.build(Request, values)
    from steer.experiments.paired.inputs import engine_of
    from steer.experiments.paired.run import run

    if request.vote and (out.quiet or (request.judge is not None)):
        raise UsageError(
            "--vote asks in the terminal, without --quiet and without a judge", "leave out --quiet and --judge"
        )
    engine = engine_of(request)
    if engine == "vllm":
        from steer.serving.offline.answers import write
    else:
        from steer.experiments.paired.through_transformers import write
    with out.progress() as on_event:
        result = run(request, write, engine, say=_ask, on_event=on_event, before_votes=out.end_stage)
    page = result.out / "report.html"
    out.result({**result.report, "page": str(page)}, lambda: _print(result.report))
    out.say(f"the page: {page}")


def _print(report: dict[str, Any]) -> None:
    from steer.reports import paired

    header, rows = paired.arm_rows(report)
    out.table(header, rows, 1)
    out.line()
    header, rows = paired.difference_rows(report)
    out.table(header, rows, 2)
    for title, (header, rows) in paired.vote_tables(report).items():
        out.line(f"\n{title}")
        out.table(header, rows, 1)
    for _, sentence in paired.sentences(report):
        out.line(f"\n{sentence}")
    for note in report["notes"]:
        out.say(note)


def _ask(prompt: str, ballot: Ballot, number: int, count: int) -> int | None:
    """Ask a person which of two answers is better; None at the end of the input, too."""
    out.say(f"\n{number} of {count}\n> {prompt}\n")
    for side, text in enumerate(ballot.texts, 1):
        out.say(f"[{side}] {text}\n")
    while True:
        out.say("better: 1, 2, t (a tie), q (go on another time)")
        line = sys.stdin.readline()
        if not line:
            return None
        answer = line.strip().lower()
        if answer in CHOICES:
            return CHOICES[answer]
