"""`steer probe saturation`: attention's entropy and saturation, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import SteerError, collecting
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.data.examples import Example
    from probes.internals.attention import Change
    from steer.evaluation.probing.internals import Saturation

MOST = 12  # changed heads that are shown


@dataclass(frozen=True, kw_only=True)
class Request(options.Devices, options.Seeded):
    """The arguments and options of `steer probe saturation`."""

    model: str = option(help=options.MODEL, argument=True, complete="models")
    against: str | None = option(None, help="Another model, such as the same after training.", complete="models")
    texts: tuple[str, ...] = option(
        (), help="A text; may be given several times.", flag=("-t", "--text"), default_text="40 openings of plain texts"
    )
    file: Path | None = option(None, help="A file of examples, one JSON value per line.", flag="--texts")


@options.command(
    "saturation",
    summary="Measure attention's entropy and saturation, by layer and head.",
    examples="""
    steer probe saturation smollm2
    steer probe saturation smollm2 --against ./warm-model --texts texts.jsonl
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Measure how spread out attention is, and what training changed of it.

    Entropy is relative to uniform attention over what a token sees: 1 is uniform, 0 is one token. Saturated are tokens
    with more than 95 % of their attention on one token. Heads with little entropy learn little more.

    With --against, a head has changed where its p-value, corrected for the number of heads, is below 0.05; fewer than
    30 texts give figures and no verdict.
    """
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.cli import output
    from steer.evaluation.probing.inputs import examples_of
    from steer.evaluation.probing.internals import report_of_heads, saturation

    examples: list[Example] = []
    with collecting(errors):
        examples = examples_of(request.texts, request.file)
    output.say_preparing(request.model)
    with out.progress() as on_event:
        found = saturation(
            request.model, request.against, examples, seed=request.seed, device=request.device, dtype=request.dtype,
            errors=errors, on_event=on_event,
        )  # fmt: skip
    data = {"model": request.model, "against_model": request.against, **report_of_heads(found)}
    out.result(data, lambda: _print(found))


def _print(found: Saturation) -> None:
    from steer.evaluation.probing.internals import by_layer

    header = ["layer", "entropy", "lowest head", "saturated", "on the first token"]
    rows = [
        [str(layer), f"{m['entropy']:.3f}", f"{lowest:.3f}", f"{m['saturated']:.3f}", f"{m['sink']:.3f}"]
        for layer, m, lowest in by_layer(found.before)
    ]
    if found.after is not None:
        header += ["entropy after", "saturated after"]
        for row, (_, means, _) in zip(rows, by_layer(found.after), strict=True):
            row += [f"{means['entropy']:.3f}", f"{means['saturated']:.3f}"]
    out.line(f"means over heads, on {found.texts} text{'s'[: found.texts != 1]}:")
    out.table(header, rows)
    if found.after is not None:
        _print_changes(found.changes["entropy"], found.texts)


def _print_changes(every: Sequence[Change], texts: int) -> None:
    from probes.statistics.verdict import too_few_to_say
    from steer.reports import page

    too_few = too_few_to_say(texts, texts, "text")
    if too_few:
        out.line(f"\n{too_few}; the heads whose entropy changed most:")
    else:
        moved = sum(bool(each.changed) for each in every)
        out.line(
            f"\n{moved} of {len(every)} heads changed their entropy (p below 0.05, corrected for the number of heads); "
            "the greatest:"
        )
    header = ["head", "entropy", "after", "change", "95 % interval", "p, corrected"]
    rows = [
        [
            f"{each.layer}.{each.head}", f"{each.before:.3f}", f"{each.after:.3f}", f"{each.change:+.3f}",
            page.interval(each.low, each.high, "+.3f"), "-" if each.p_adjusted is None else f"{each.p_adjusted:.3g}",
        ]
        for each in every[:MOST]
    ]  # fmt: skip
    shown = len(header) if texts > 1 else header.index("95 % interval")
    out.table(header[:shown], [row[:shown] for row in rows])
