"""`steer probe attribute`: which components carry a vector's effect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import SteerError, collecting
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.data.examples import Example
    from probes.internals.attribution import Attribution

MOST = 20  # components that are shown


@dataclass(frozen=True, kw_only=True)
class Request(options.AnyBase, options.Devices):
    """The arguments and options of `steer probe attribute`."""

    vector: Path = option(help="The vector file.", argument=True, complete="vectors")
    texts: tuple[str, ...] = option(
        (), help="A text; may be given several times.", flag=("-t", "--text"), default_text="40 openings of plain texts"
    )
    file: Path | None = option(None, help="A file of examples, one JSON value per line.", flag="--texts")
    probe: Path | None = option(
        None, help="A probe, whose score's change is explained.", default_text="the effect itself", complete="vectors"
    )
    layer: int | None = option(
        None, help="The layer whose stream is explained.", low=0, default_text="the probe's, or the last"
    )
    strength: float | None = option(None, help="The strength.", default_text="the vector's recommended one, or 1")
    tokens: str = option("all", help=options.TOKENS)
    heads: bool = option(False, help="Split attention into its heads.")
    model: str | None = option(
        None, help=options.MODEL, default_text="the model the vector was made from", complete="models"
    )


@options.command(
    "attribute",
    summary="Show which components carry a vector's effect.",
    examples="""
    steer probe attribute warm.safetensors -t "I lost my keys."
    steer probe attribute warm.safetensors --probe warm-probe.safetensors --heads --texts prompts.jsonl
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Show which components carry a vector's effect on the residual stream of a layer: an exact sum.

    Steered against not, the stream changes by the vector and by what attention and MLP of each block above it add
    differently. Along a probe's weight the parts add up to the change of its score. Needs the extra `lens`.
    """
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.probing.inputs import examples_of
    from steer.evaluation.probing.internals import attribute

    examples: list[Example] = []
    with collecting(errors):
        examples = examples_of(request.texts, request.file)
    with out.progress() as on_event:
        found, strength = attribute(
            request.vector, examples, probe=request.probe, layer=request.layer, strength=request.strength,
            tokens=request.tokens, heads=request.heads, model=request.model, any_base=request.any_base,
            device=request.device, dtype=request.dtype, errors=errors, on_event=on_event,
        )  # fmt: skip
    data = {
        "vector": str(request.vector), "probe": None if request.probe is None else str(request.probe),
        "strength": strength, "layer": found.layer, "total": found.total, "texts": len(examples),
        "components": [each._asdict() for each in found.components],
    }  # fmt: skip
    out.result(data, lambda: _print(found, strength, request.probe))


def _print(found: Attribution, strength: float, probe: Path | None) -> None:
    what = "length of the stream's change" if probe is None else f"change of {probe.stem}'s score"
    out.line(f"{what} at layer {found.layer}, strength {strength:g}: {found.total:.4g}\n")
    rows = [
        [each.name, f"{each.contribution:.4g}", f"{each.contribution / found.total:+.1%}" if found.total else "-"]
        for each in found.components
    ]
    rest = found.components[MOST:]
    if rest:
        left = sum(each.contribution for each in rest)
        share = f"{left / found.total:+.1%}" if found.total else "-"
        rows = [*rows[:MOST], [f"the other {len(rest)}", f"{left:.4g}", share]]
    out.table(["component", "contribution", "share"], rows, left=1)
