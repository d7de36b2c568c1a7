"""`steer ab report`: what an experiment has shown so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named, _log.Version):
    """The arguments and options of `steer ab report`."""

    html: bool = option(False, help="Write the report as a page, NAME-report.html, and NAME-report.json beside it.")
    out: Path | None = option(None, help="The folder for both files.", default_text="the current folder, with --html")


@options.command(
    "report",
    summary="Report an experiment: health, effects with intervals, guardrails, and the decision.",
    examples="""
    steer ab report tone
    steer ab report tone --html
    steer ab report tone --json --out results/
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Report an experiment: health, effects with intervals, guardrails, and the decision.

    Intervals hold at every interim analysis, so the report may be read as often as one likes. Exit code: 0 when every
    arm is decided (with adaptive weights: when one is selected), 1 while one is not, or when the experiment is
    unhealthy.
    """
    from steer.experiments import document
    from steer.experiments.overview import version_in
    from steer.experiments.reporting.report import decided, report
    from steer.experiments.storage import state

    request = requests.build(Request, values)
    experiment = document.read(document.find(request.experiment))
    with _log.opened(request.experiment) as log:
        version = version_in(log.engine, experiment.name, request.version)
        served = state.version_of(log.engine, experiment.name, experiment.digest)
        if served != version:
            known = "not served" if served is None else f"version {served}"
            raise UsageError(
                f"{experiment.file} as it is now is {known}, and the report would be of version {version}",
                "undo the edit" if served is None else f"report that version: --version {served}",
            )
        data = report(log.engine, experiment, version)
    if request.html or request.out is not None:
        data["files"] = _written(data, request.out or Path())
    out.result(data, lambda: _print(data))
    if not decided(data):
        raise SystemExit(1)


def _written(data: Mapping[str, Any], folder: Path) -> list[str]:
    from steer.reports import experiment as pages
    from vectors.storage.files import readable_json, write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    record, page = (folder / f"{data['experiment']}-report.{kind}" for kind in ("json", "html"))
    write_atomically(record, readable_json(data))
    write_atomically(page, pages.html(data, record.name).encode())
    return [str(record), str(page)]


def _print_selection(data: Mapping[str, Any]) -> None:
    """The block about the selection, with adaptive weights."""
    from steer.reports import experiment as pages

    found = data["allocation"]
    out.line(f"{found['label']} ({found['method']})\n\n{pages.verdict(found)}\n")
    out.table(list(pages.EVIDENCE), pages.evidence_rows(data), 1)


def _print(data: Mapping[str, Any]) -> None:
    from steer.reports import experiment as pages

    if data["allocation"]:
        _print_selection(data)
    if data["stopped"]:
        out.line(f"{pages.stopped(data)}\n")
    for arm, decision, reason, units in pages.decision_rows(data):
        more = f"; about {units} more units" if units else ""
        out.line(f"{arm}: {decision} ({reason}{more})")
    out.line()
    counts = ("units", "counted", "failed", "refused")
    rows = [
        [arm["name"], f"{100 * arm['weight']:.4g} %", *(str(arm.get(key, 0)) for key in counts)] for arm in data["arms"]
    ]
    share = "share at first" if data["allocation"] else "share"
    out.table(["arm", share, "units", "answers", "failed", "refused"], rows, 1)
    if data["metrics"]:
        out.line()
        out.table(list(pages.metric_columns(data)), pages.metric_rows(data, primary=True), 2)
        if secondary := pages.metric_rows(data, primary=False):
            out.line("\nother metrics (exploratory):\n")
            out.table(list(pages.metric_columns(data)), secondary, 2)
    if data["guardrails"]:
        out.line()
        out.table(list(pages.GUARDRAIL_COLUMNS), pages.guardrail_rows(data), 2)
    out.line()
    out.line("\n".join(pages.notes(data, f"{100 * data['level']:.4g} %")))
    if data.get("files"):
        out.line(f"\nwritten: {', '.join(data['files'])}")
