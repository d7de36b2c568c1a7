"""`steer probe test`: test a probe on examples that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import SteerError, collecting
from vectors.registry.options import option

if TYPE_CHECKING:
    from steer.evaluation.probing.measure import Measurement


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.AnyBase, options.Devices, options.Seeded, options.ReadByProbe):
    """The arguments and options of `steer probe test`."""

    probe: Path = option(help="The probe file.", argument=True, complete="vectors")
    pos: Path | None = option(None, help="Positive examples from the distribution of the training data.")
    neg: Path | None = option(None, help="Negative examples from the distribution of the training data.")
    pairs: Path | None = option(None, help="One file that holds both classes, instead of --pos and --neg.")
    ood_pos: Path | None = option(None, help="Positive examples from another distribution.")
    ood_neg: Path | None = option(None, help="Negative examples from another distribution.")
    ood_pairs: Path | None = option(None, help="One file of both classes from another distribution.")
    threshold: float | None = option(
        None, help="The score above which a text counts as positive.", default_text="the probe's own, or 0"
    )
    html: Path | None = option(None, help="A page to write, in .html.")


@options.command(
    "test",
    summary="Test a probe on other examples, in and out of its distribution.",
    examples="""
    steer probe test warm-probe.safetensors --pos more-warm.jsonl --neg more-cold.jsonl
    steer probe test warm-probe.safetensors --pairs a.jsonl --ood-pairs other.jsonl --html tested.html
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Test a probe: AUROC with its interval, Brier score, cross-entropy, calibration, confusion at the threshold.

    Both classes count the same in every figure, however many examples they have. Examples that the probe was trained on
    are recognised by their digests, and refused.
    """
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.probing.measure import measure
    from steer.reports import probes as reports

    with collecting(errors):
        output.require_page(request.html, request.force)
    arguments = {name: value for name, value in vars(request).items() if name not in ("force", "html")}
    with out.progress() as on_event:
        measured = measure(**arguments, errors=errors, on_event=on_event)
    for warning in measured.warnings:
        out.warn(warning)
    data = {"probe": str(request.probe), **measured.report()}
    if request.html is not None:
        output.write_page(request.html, reports.test_page(request.probe.stem, measured.report()))
        data["page"] = str(request.html)
    out.result(data, lambda: _print(measured, request.html))


def _print(measured: Measurement, page: Path | None) -> None:
    from steer.reports.probes import CALIBRATION, calibration_rows, figure_rows

    out.line(
        f"layer {measured.layer}, threshold {measured.threshold:.4g}, tokens: {measured.tokens}, {measured.pool}\n"
    )
    out.table(["", *measured.sets], figure_rows({name: each.figures for name, each in measured.sets.items()}), left=1)
    for name, each in measured.sets.items():
        counts = each.examples
        out.line(f"\n{name}, {counts['positive']} + {counts['negative']} examples: {each.figures.confusion.sentence()}")
        out.table(CALIBRATION, calibration_rows(each.curve))
    if page is not None:
        out.line(f"\nwrote {page}")
