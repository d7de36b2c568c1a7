"""`steer sweep`: the layer, strength and method that steer a behaviour most within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.arms import BUDGET
from steer.cli import options, requests
from steer.cli.output import out
from steer.cli.sweeping import finish, require_outputs
from vectors.documents.numbers import number
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


def numbers(option: str, texts: str | Sequence[str], example: str = "0.5,1,2") -> tuple[float, ...]:
    """The numbers of an option, separated by commas. Raises UsageError with every malformed one."""
    values = [(part, number(part)) for part in names(texts)]
    problems = [
        f"{option}: {part!r} is not a number"
        for part, value in values
        if not isinstance(value, int | float) or not abs(value) < math.inf
    ]
    if problems:
        raise UsageError(problems, f"write numbers separated by commas: {option} {example}")
    return tuple(float(value) for _, value in values)


def strengths(texts: str | Sequence[str]) -> tuple[float, ...]:
    """The numbers of --strengths. Raises UsageError."""
    from steer.evaluation.sweeping.request import Settings, require_possible

    values = numbers("--strengths", texts)
    require_possible(Settings(strengths=values).problems(), values)
    return values


def counts(texts: str | Sequence[str]) -> tuple[int, ...]:
    """The whole numbers of --examples. Raises UsageError."""
    from steer.evaluation.sweeping.request import Settings, require_possible

    values = numbers("--examples", texts, "10,25,50")
    problems = [f"--examples: {value:g} is not a whole number" for value in values if not value.is_integer()]
    if problems:
        raise UsageError(problems, "write whole numbers separated by commas: --examples 10,25,50")
    sizes = tuple(int(value) for value in values)
    require_possible(Settings(examples=sizes).problems())
    return sizes


def layers_of(text: str) -> str:
    """The text of --layers, whose form is checked. Raises UsageError."""
    from steer.evaluation.sweeping.groups import parse_groups

    parse_groups(text)
    return text


def methods_of(texts: str | Sequence[str]) -> tuple[str, ...]:
    """The methods that --methods names. Raises UsageError with every unknown one."""
    from probes.directions.methods import method

    errors: list[SteerError] = []
    for name in names(texts):
        with collecting(errors):
            method(name)
    raise_together(errors)
    return names(texts)


def names(texts: str | Sequence[str]) -> tuple[str, ...]:
    """Names separated by commas, in one text or several."""
    together = texts if isinstance(texts, str) else ",".join(texts)
    return tuple(part.strip() for part in together.split(",") if part.strip())


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.AnyBase, options.Devices, options.Spread, options.Seeded):
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
    layers: str = option("auto", help=LAYERS, parse=layers_of)
    strengths: tuple[float, ...] = option((), help=STRENGTHS, metavar="LIST", parse=strengths)
    methods: tuple[str, ...] = option(
        (), help="Extraction methods to compare: the files are split three ways, and directions are extracted from "
        "the first part and replace those of the vector (--out keeps its file): {names}.", names=methods,
        metavar="LIST", parse=methods_of,
    )  # fmt: skip
    examples: tuple[int, ...] = option((), help=EXAMPLES, metavar="LIST", parse=counts)
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
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.sweeping.api import sweep

    target = request.out or request.vector
    folder = request.report or target.with_name(f"{target.stem}.sweep")
    inputs = {"--suite": request.suite, "--pos": request.pos, "--neg": request.neg, "--pairs": request.pairs,
              "--choices": request.choices, "--neutral": request.neutral}  # fmt: skip
    with collecting(errors):
        require_outputs(target, folder, request.force, swept=request.vector, inputs=inputs)
    if errors:
        _require_right(request, names(values["methods"] or ()), errors)
    with out.progress() as on_event:
        result = sweep(
            request.vector, suite=request.suite, pos=request.pos, neg=request.neg, pairs=request.pairs,
            choices=request.choices, neutral=request.neutral, layers=request.layers,
            strengths=request.strengths, methods=request.methods, examples=request.examples,
            budget_kl=request.budget_kl, report=folder, model=request.model, allow_overlap=request.allow_overlap,
            any_base=request.any_base, device=request.device, dtype=request.dtype, ray=request.ray,
            seed=request.seed, on_event=on_event,
        )  # fmt: skip
    finish(result, target, folder, request.model or "")


def _require_right(request: Request, methods: Sequence[str], errors: Sequence[SteerError]) -> None:
    """Raise the errors that were found in the options, with those of the files and the vector that a request names;
    `methods` are as they were typed, since other files are read with them than without."""
    from steer.evaluation.suites.reading import Sources
    from steer.evaluation.sweeping.inputs import read_inputs
    from steer.evaluation.sweeping.request import Settings

    sources = Sources(
        suite=request.suite, pos=request.pos, neg=request.neg, pairs=request.pairs, choices=request.choices,
        neutral=request.neutral,
    )  # fmt: skip
    settings = Settings(
        layers=request.layers, strengths=request.strengths, examples=request.examples, budget=request.budget_kl,
        seed=request.seed, any_base=request.any_base,
    )  # fmt: skip
    read_inputs(
        request.vector, sources, settings, methods=methods, allow_overlap=request.allow_overlap,
        own_model=request.model is None, errors=errors,
    )  # fmt: skip
