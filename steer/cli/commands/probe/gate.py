"""`steer probe gate`: choose a probe's threshold for conditional steering."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import SteerError, collecting
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.readouts.thresholds import Rate
    from steer.evaluation.probing.gate import Gated


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.AnyBase, options.Devices, options.Seeded, options.ReadByProbe):
    """The arguments and options of `steer probe gate`."""

    probe: Path = option(help="The probe file.", argument=True, complete="vectors")
    neg: Path = option(help="Texts on which the gate must stay closed.")
    pos: Path | None = option(None, help="Texts on which it must open; they only report, the threshold ignores them.")
    fpr: float = option(0.01, help="The false-positive rate, above 0 and below 1.")
    per_token: bool = option(False, help="Decide at every token, as @while: does, instead of once, as @when: does.")
    out: Path | None = option(None, help="A .safetensors file for the probe with its threshold.", flag=("-o", "--out"))


@options.command(
    "gate",
    summary="Choose a probe's threshold at a stated false-positive rate.",
    examples="""
    steer probe gate asks.safetensors --neg everyday.jsonl --pos questions.jsonl --fpr 0.05 -o gated.safetensors
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Choose the threshold for conditional steering at a stated false-positive rate.

    Half of the negatives choose it: further negatives of their kind exceed it at the stated rate or less, whatever the
    distribution of scores. The other half reports, and so do the positives, but for those that share a group, prompt or
    text with a negative that chose. Prints the condition for an expression, where it
    reads what the scores are of: the last token of a prompt (--tokens prompt), or with --per-token those of a response.
    """
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.probing.gate import gate

    replacing = ""
    if request.out is not None:
        with collecting(errors):
            output.require_absent(request.out, request.force)
        replacing = output.replacing(request.out)
    arguments = {name: value for name, value in vars(request).items() if name != "force"}
    with out.progress() as on_event:
        gated = gate(**arguments, errors=errors, on_event=on_event)
    out.say(replacing)
    for warning in gated.warnings:
        out.warn(warning)
    file = request.out or request.probe
    data = {
        "probe": str(file), "condition": gated.condition(file.stem), "no_condition": gated.no_condition,
        "tokens": gated.tokens, "pool": None if gated.gate.per_token else gated.pool, **gated.gate.report(),
        "warnings": list(gated.warnings),
    }  # fmt: skip
    if request.out is not None:
        data["digest"] = gated.gate.probe.digest
    out.result(data, lambda: _print(gated, file, request.out))


def _print(gated: Gated, file: Path, written: Path | None) -> None:
    found = gated.gate
    unit = "tokens" if found.per_token else "texts"
    out.line(
        f"layer {found.layer}: threshold {found.threshold.value:.10g} for a false-positive rate of {found.rate:g}, "
        f"chosen on {found.threshold.chosen_on} {unit}\n"
    )
    rows = [["negatives above it", *_cells(found.false_positive)]]
    if found.true_positive is not None:
        rows.append(["positives above it", *_cells(found.true_positive)])
    out.table(["on what did not choose", "rate", "95 % interval", unit], rows, left=1)
    if found.left_out:
        out.line(
            f"\n{found.left_out} positives share a group, prompt or text with negatives that chose the threshold, and "
            "are left out"
        )
    if found.probability is not None and found.probability < 0.025:
        out.line(
            f"\nso many false positives have a probability of {found.probability:.2g} if both halves are of one kind: "
            "check for groups among the negatives"
        )
    condition = gated.condition(file.stem)
    out.line(f"\nno condition: {gated.no_condition}" if condition is None else f"\ncondition: {condition}")
    if written is not None:
        out.line(f"wrote {written}  {found.probe.digest}")


def _cells(rate: Rate) -> list[str]:
    return [f"{rate.value:.4f}", f"{rate.low:.4f} to {rate.high:.4f}", f"{rate.above} of {rate.total}"]
