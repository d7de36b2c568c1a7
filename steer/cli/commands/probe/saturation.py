"""`steer probe saturation`: attention's entropy and saturation, by layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option

if TYPE_CHECKING:
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
    """
    request = requests.build(Request, values)
    from steer.cli import output
    from steer.evaluation.probing.inputs import examples_of
    from steer.evaluation.probing.internals import report_of_heads, saturation

    examples = examples_of(request.texts, request.file)
    output.say_preparing(request.model)
    with out.progress() as on_event:
        found = saturation(
            request.model, request.against, examples, seed=request.seed, device=request.device, dtype=request.dtype,
            on_event=on_event,
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
    out.line(f"means over heads, on {found.texts} texts:")
    out.table(header, rows)
    if found.after is None:
        return
    every = found.changes["entropy"]
    moved = [each for each in every if each.low > 0 or each.high < 0]
    out.line(f"\n{len(moved)} of {len(every)} heads changed their entropy (the interval excludes 0); the greatest:")
    rows = [
        [
            f"{each.layer}.{each.head}", f"{each.before:.3f}", f"{each.after:.3f}", f"{each.change:+.3f}",
            f"{each.low:+.3f} to {each.high:+.3f}",
        ]
        for each in every[:MOST]
    ]  # fmt: skip
    out.table(["head", "entropy", "after", "change", "95 % interval"], rows)
