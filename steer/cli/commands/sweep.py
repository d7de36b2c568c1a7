"""`steer sweep`: the layer, strength and method that steer a behaviour most within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.arms import BUDGET
from steer.cli import options, requests
from steer.cli.output import out
from steer.cli.sweeping import finish
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.registry import plugins
from vectors.registry.options import option

LAYERS = (
    "The layers to try: auto (a golden-section search for one), all, or a list of single layers, pairs and bands such "
    "as 8-20,10+14,8..12."
)
STRENGTHS = "A grid of strengths, such as 0.5,1,2; else each candidate is tried at the greatest within the budget."
EXAMPLES = "The learning curve: the effect of a vector from so many examples of each class, such as 10,25,50."


def methods() -> list[str]:
    """The names of the extraction methods."""
    return plugins.names("probes.directions.methods", "steer.extraction_methods")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises UsageError."""
    try:
        return tuple(float(part) for part in names(text))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers", "write 0.5,1,2") from error


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas. Raises UsageError."""
    values = numbers(text)
    if not all(value.is_integer() for value in values):
        raise UsageError(f"{text!r} is not a list of whole numbers", "write 10,25,50")
    return tuple(int(value) for value in values)


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True, kw_only=True)
class Request(options.AnyBase, options.Devices, options.Spread, options.Seeded):
    """The arguments and options of `steer sweep`."""

    vector: Path = option(help="The vector, which gets the recommendation.", argument=True, complete="vectors")
    suite: Path | None = option(None, help="A suite of items (docs/eval.md), instead of --pos and --neg.")
    pos: Path | None = option(None, help="Examples that show the behaviour, which the vector was not extracted from.")
    neg: Path | None = option(None, help="Examples that show the opposite behaviour.")
    pairs: Path | None = option(None, help="One file that holds both classes, instead of --pos and --neg.")
    choices: Path | None = option(
        None, help="Multiple-choice questions in the yes/no persona format or the A/B format of CAA, instead of pairs."
    )
    neutral: Path | None = option(
        None, help="Neutral prompts, on whose continuations the cost is measured.", default_text="built-in prompts"
    )
    layers: str = option("auto", help=LAYERS)
    strengths: str | None = option(None, help=STRENGTHS, metavar="LIST")
    methods: str | None = option(
        None, help="Extraction methods to compare: the files are split three ways, and directions are extracted from "
        "the first part and replace those of the vector (--out keeps its file): {names}.", names=methods,
        metavar="LIST",
    )  # fmt: skip
    examples: str | None = option(None, help=EXAMPLES, metavar="LIST")
    budget_kl: float = option(
        BUDGET, low=0, open_low=True,
        help="What the point may cost on neutral text: nats, the 95th percentile of the KL divergence per token.",
    )  # fmt: skip
    out: Path | None = option(
        None, help="The .safetensors file to write.", flag=("-o", "--out"), default_text="the vector's own file"
    )
    report: Path | None = option(
        None, help="The folder of the report and of what was measured so far; a sweep that was ended goes on there.",
        default_text="NAME.sweep beside the vector",
    )  # fmt: skip
    model: str | None = option(
        None, help=options.MODEL, default_text="the model the vector was made from", complete="models"
    )
    allow_overlap: bool = option(False, help="Allow items that the vector was extracted from.")


@options.command(
    summary="Find the layer, strength and method that steer most within a budget.",
    examples="""
    steer sweep warm.safetensors --pos held-out-warm.jsonl --neg held-out-cold.jsonl
    steer sweep warm.safetensors --pairs other.jsonl --layers 8-20,10+14 --strengths 0.5,1,2 --budget-kl 0.2
    steer sweep warm.safetensors --pairs pairs.jsonl --methods diffmean,whitened --examples 10,25,50
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Find where and how strongly a vector steers a behaviour most, and write it into the vector.

    Each candidate is tried at the greatest strength whose KL divergence on neutral text stays within --budget-kl, so
    that layers and methods are compared at equal cost. The choice is made on development items, and measured again on
    test items. Killed at any point and started again, a sweep goes on where it was.
    """
    request = requests.build(Request, values)
    from steer.evaluation.sweeping.api import sweep
    from vectors.storage.files import require_writable

    target = request.out or request.vector
    strengths: tuple[float, ...] = ()
    examples: tuple[int, ...] = ()
    errors: list[SteerError] = []
    with collecting(errors):
        require_writable(target)
    with collecting(errors):
        strengths = numbers(request.strengths or "")
    with collecting(errors):
        examples = counts(request.examples or "")
    raise_together(errors)
    folder = request.report or target.with_name(f"{target.stem}.sweep")
    with out.progress() as on_event:
        result = sweep(
            request.vector, suite=request.suite, pos=request.pos, neg=request.neg, pairs=request.pairs,
            choices=request.choices, neutral=request.neutral, layers=request.layers, strengths=strengths,
            methods=names(request.methods or ""), examples=examples, budget_kl=request.budget_kl,
            report=folder, model=request.model, allow_overlap=request.allow_overlap, any_base=request.any_base,
            device=request.device, dtype=request.dtype, ray=request.ray, seed=request.seed, on_event=on_event,
        )  # fmt: skip
    finish(result, target, folder, request.model or "")
