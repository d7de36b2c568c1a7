"""`steer ab status`: the state of an experiment, and what its log holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named, _log.Version):
    """The arguments and options of `steer ab status`."""


@options.command(
    "status",
    summary="Show the state of an experiment: stage, stops, answers by arm, and feedback.",
    examples="""
    steer ab status tone
    steer ab status tone --json
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show the state of an experiment: stage, stops, answers by arm, and the feedback to all of its versions.

    These are counts, not results: steer ab report has those.
    """
    from steer.experiments.overview import overview, version_in

    request = requests.build(Request, values)
    with _log.opened(request.experiment) as log:
        version = version_in(log.engine, log.address.name, request.version)
        data = overview(log.engine, log.address.name, version)
    out.result(data, lambda: _print(data))


def _print(data: Mapping[str, Any]) -> None:
    state = f"stopped: {data['stopped']}" if data["stopped"] else "ramping" if data["ramping"] else "running"
    facts = {
        "experiment": f"{data['experiment']}, version {data['version']}, {data['digest'][:19]}",
        "began": _time(data["began"]),
        "state": f"{state}, coverage {data['coverage']:.4g} (stage {data['stage']})",
        "dropped": f"{data['dropped']} rows" if data["dropped"] else "",
    }
    out.line("\n".join(f"{key:12}{value}" for key, value in facts.items() if value))
    out.line()
    header = ["arm", "answers", "counted", "units", "forced", "outside", "failed", "refused"]
    if data["allocation"]:
        _print_allocation(data["allocation"])
    out.table(header, [[arm, *(str(counts[key]) for key in header[1:])] for arm, counts in data["arms"].items()], 1)
    if data["feedback"]:
        out.line()
        keys = ["received", "unknown", "late"]
        rows = [[metric, *(str(counts[key]) for key in keys)] for metric, counts in data["feedback"].items()]
        out.table(["feedback, all versions", *keys], rows, 1)
    for judge, reasons in data["judges"].items():
        received = data["feedback"].get(judge, {"received": 0})["received"]
        missing = ", ".join(f"{reason} (at least {count} answers)" for reason, count in reasons.items())
        if missing or (not received and any(counts["answers"] for counts in data["arms"].values())):
            why = missing or "none has arrived yet; GET /steer/experiments of the server says more"
            out.line(f"\nratings of the judge {judge} are missing: {why}")
    if data["events"]:
        out.line()
        out.line("\n".join(f"{_time(event['at'])}  {event['kind']}  {event['reason']}" for event in data["events"]))


def _print_allocation(found: Mapping[str, Any]) -> None:
    """The epoch of adaptive weights."""
    since = f", since {_time(found['at'])}" if found["at"] else ""
    shares = ", ".join(f"{arm} {weight:.3g}" for arm, weight in found["weights"].items())
    out.line(f"{found['method']} (selection, not estimation): epoch {found['epoch']}{since}")
    out.line(f"weights now: {shares}\n{found['reason']}\n")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
