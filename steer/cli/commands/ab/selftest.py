"""`steer ab selftest`: simulate an experiment as its file has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named):
    """The arguments and options of `steer ab selftest`."""

    units: int | None = option(
        None,
        help="Units in each simulated experiment, of two arms together; of all arms with adaptive weights.",
        low=2,
        default_text="the number planned; with adaptive weights twice that",
    )
    seed: int = option(0, help="The seed of the simulation.", low=0)


@options.command(
    "selftest",
    summary="Simulate an experiment: false positives, power, and the check of the arms' shares.",
    examples="""
    steer ab selftest tone
    steer ab selftest tone --units 4000
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Simulate an experiment: false positives, power, and the check of the arms' shares.

    2,000 experiments without a difference and 2,000 with the smallest effect of interest, each analysed 40 times, with
    the weights and the metric of the file. With adaptive weights: 1,000 in which all arms are alike, and 1,000 in which
    one is better by that effect. Exit code 1 where false positives, or wrong selections, are surely above the level.
    """
    from steer.experiments import document
    from steer.experiments.selftest import selftest

    request = requests.build(Request, values)
    data = selftest(document.read(document.find(request.experiment)), request.units, request.seed)
    out.result(data, lambda: _print(data))
    if not data["passed"]:
        raise SystemExit(1)


def _print_selection(data: Mapping[str, Any]) -> None:
    out.line(
        f"{data['experiments']:,} simulated experiments of {data['units']:,} units in {len(data['arms'])} arms, with "
        f"new weights {data['interim_analyses']} times ({data['method']})"
    )
    out.line()
    rows = []
    for title, rates in (("all arms alike", data["same"]), (f"one better by {data['effect']:g}", data["apart"])):
        wrong = f"{rates['wrong']:.1%} ({rates['low']:.1%} to {rates['high']:.1%})" if rates is data["apart"] else ""
        median = "" if rates["median_units"] is None else f"{rates['median_units']:,.0f}"
        rows.append([title, f"{rates['decided']:.1%}", wrong, median, f"{rates['mismatched']:.2%}"])
    out.table(["", "an arm selected", "a wrong one", "median units", "shares refused"], rows, 1)
    out.line()
    out.line(
        f"Aims: a wrong arm in at most {data['error_rate']:.1%}, shares refused in "
        f"{data['sample_ratio_threshold']:.1%}. Where all arms are alike, none is wrong."
    )


def _print(data: Mapping[str, Any]) -> None:
    if "method" in data:
        _print_selection(data)
        return
    same, apart = data["same"], data["apart"]
    out.line(
        f"{data['experiments']:,} simulated experiments of {data['units']:,} units, each analysed "
        f"{data['interim_analyses']} times"
    )
    out.line()
    rows = []
    for title, rates in (("no difference", same), (f"a difference of {data['effect']:+g}", apart)):
        share = f"{rates['significant']:.1%} ({rates['low']:.1%} to {rates['high']:.1%})"
        median = "" if rates["median_units"] is None else f"{rates['median_units']:,.0f}"
        rows.append([title, share, median, f"{rates['covered']:.1%}", f"{rates['mismatched']:.2%}"])
    out.table(["", "ever significant", "median units", "interval always right", "shares refused"], rows, 1)
    out.line()
    out.line(
        f"Aims: at most {1 - data['level']:.1%} without a difference, intervals right in {data['level']:.1%}, shares "
        f"refused in {data['sample_ratio_threshold']:.1%}. With a difference, the share is the power."
    )
