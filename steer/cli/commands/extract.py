"""`steer extract`: extract a steering vector from two files of examples."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.arms import BUDGET, QUICK_BUDGET
from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import SteerError, collecting
from vectors.registry import plugins
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.directions.extraction import Extraction


def methods() -> list[str]:
    """The names of the extraction methods."""
    return plugins.names("probes.directions.methods", "steer.extraction_methods")


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.Devices, options.Spread, options.Seeded):
    """The options of `steer extract`."""

    pos: Path | None = option(None, help="Examples that show the behaviour, one JSON value per line.")
    neg: Path | None = option(None, help="Examples that show the opposite behaviour.")
    pairs: Path | None = option(None, help="One file that holds both classes, instead of --pos and --neg.")
    model: str = option("smollm2", help=options.MODEL, complete="models")
    method: str = option(
        "diffmean", help="The method that computes a direction from activations: {names}.", names=methods
    )
    layers: str = option(
        "all",
        help="The layers to extract from: all, or a list such as 3,5,12-15; layer i is the output of block i.",
    )
    tokens: str = option(
        "completion", help="Which tokens of an example count: completion, last, all, or an index such as 0 or -1."
    )
    out: Path | None = option(
        None,
        help="The .safetensors file to write.",
        flag=("-o", "--out"),
        default_text="the name of --pos or --pairs, in the current folder",
    )
    match: str | None = option(
        None, help="Make classes of different length alike: average over as many tokens in both classes, or over the "
        "same positions.", choices=("length", "position"),
    )  # fmt: skip
    budget_kl: float | None = option(
        None, low=0, help="What the recommended strength may cost on neutral text: nats, the 95th percentile of the KL "
        "divergence per token; 0 recommends without a calibration.", default_text=f"{QUICK_BUDGET:g}, with --sweep "
        f"{BUDGET:g}",
    )  # fmt: skip
    sweep: bool = option(
        False, help="Choose layer and strength by a sweep: extract from six tenths of the examples, choose on two, and "
        "test the choice on two (docs/sweep.md).",
    )  # fmt: skip
    truncate: bool = option(False, help="Cut examples that exceed the model's context, instead of refusing them.")


@options.command(
    summary="Extract a steering vector from contrasting examples, and validate it.",
    examples="""
    steer extract --pos warm.jsonl --neg cold.jsonl
    steer extract --pairs pairs.jsonl --method whitened --layers 8-20 --out warm.safetensors
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Extract a steering vector from contrasting examples, and validate it on held-out examples.

    A line is a plain JSON string, {"text"}, {"prompt","completion"} or {"messages"}; with --pairs it is
    {"prompt","positive","negative"} or a yes/no persona statement. Each layer's direction is validated on held-out
    folds and compared with shuffled labels. Layer and strength are recommended by a calibration on generated text: of a
    few layers, each at the strength that --budget-kl allows, the one that moves held-out examples most.
    """
    source = values["pos"] or values["pairs"]
    if values["out"] is None and source is not None:
        values["out"] = Path(f"{source.stem}.safetensors")
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.extraction import extract, read_inputs
    from vectors.storage.files import require_distinct

    replacing = ""
    if request.out is not None:
        with collecting(errors):
            require_distinct(request.out, {"--pos": request.pos, "--neg": request.neg, "--pairs": request.pairs})
        with collecting(errors):
            output.require_absent(request.out, request.force)
            replacing = output.replacing(request.out)
    if errors:
        read_inputs(
            request.pos, request.neg, request.pairs, method=request.method, tokens=request.tokens,
            layers="all" if request.sweep else request.layers, device=request.device, dtype=request.dtype,
            ray=request.ray, budget_kl=QUICK_BUDGET if request.budget_kl is None else request.budget_kl,
            out=request.out, errors=errors,
        )  # fmt: skip
    output.say_preparing(request.model)
    if request.sweep:
        _sweep(request)
        return
    arguments = {name: value for name, value in vars(request).items() if name not in ("force", "sweep")}
    if request.budget_kl is None:
        arguments["budget_kl"] = QUICK_BUDGET
    with out.progress() as on_event:
        extraction = extract(**arguments, on_event=on_event)
    out.say(replacing)
    for note in extraction.notes:
        out.say(note)
    for warning in extraction.warnings:
        out.warn(warning)
    assert request.out is not None
    data = {
        "vector": str(request.out),
        "digest": extraction.vector.digest,
        "model": request.model,
        "model_path": str(extraction.source.path),
    }
    file = request.out
    out.result({**data, **extraction.report()}, lambda: _print(extraction, file, request.model))


def _sweep(request: Request) -> None:
    """Extract and sweep in one go."""
    from probes.data.reading import read
    from steer.cli.sweeping import finish, require_own_folder
    from steer.evaluation.sweeping.api import sweep_examples
    from steer.evaluation.sweeping.request import Settings
    from steer.extraction import require_output
    from vectors.errors import UsageError, raise_together

    assert request.out is not None
    folder = request.out.with_name(f"{request.out.stem}.sweep")
    errors: list[SteerError] = []
    with collecting(errors):
        require_output(request.out, {"--pos": request.pos, "--neg": request.neg, "--pairs": request.pairs})
    with collecting(errors):
        require_own_folder(folder, request.force, "--out FILE")
    with collecting(errors):
        contrast = read(request.pos, request.neg, request.pairs)
    with collecting(errors):
        if request.budget_kl == 0:
            raise UsageError("a sweep needs a budget above 0", f"use --budget-kl {BUDGET:g}")
    raise_together(errors)
    settings = Settings(
        layers="auto" if request.layers == "all" else request.layers, budget=request.budget_kl or BUDGET,
        seed=request.seed, folder=folder,
    )  # fmt: skip
    with out.progress() as on_event:
        result = sweep_examples(
            contrast, settings, model=request.model, methods=(request.method,), tokens=request.tokens,
            match=request.match, truncate=request.truncate, device=request.device, dtype=request.dtype,
            ray=request.ray, on_event=on_event,
        )  # fmt: skip
    finish(result, request.out, folder, request.model, always=True)


def _print(extraction: Extraction, file: Path, model: str) -> None:
    out.table(["", "layer", "norm", "AUROC", "95 % interval", "shuffled", "Cohen's d"], layer_rows(extraction))
    examples, recommended = extraction.examples, extraction.recommended
    out.line(
        f"\n{'recommended' if recommended.proven else 'nothing can be recommended; to begin with'}: layer "
        f"{recommended.layers[0]} (marked *), strength {recommended.strength:g}: "
        f"{recommended.reason}"
    )
    out.line(f"wrote {file}  {extraction.vector.digest}")
    out.say(
        f"\n{examples['positive']} + {examples['negative']} examples, {extraction.tokens['computed']} tokens computed, "
        f'{extraction.seconds:.1f} s\nnext: steer try {shlex.quote(str(file))}{output.next_model(model)} -p "…"'
    )
    if not file.stem.isidentifier():
        out.say(f"in an expression, the name stands in quotes: steer try \"1.5*'{file.stem}'\"")


def layer_rows(extraction: Extraction) -> list[list[str]]:
    """The validation of each layer as cells; `*` marks the layers that act by default."""
    rows = []
    for entry in extraction.report()["layers"]:
        numbers = {key: "-" if value is None else f"{value:.3f}" for key, value in entry.items() if key != "layer"}
        rows.append(
            [
                "*" if entry["layer"] in extraction.recommended.layers else "",
                str(entry["layer"]),
                f"{entry['norm']:.2f}",
                numbers["auroc"],
                f"{numbers['auroc_low']} to {numbers['auroc_high']}",
                numbers["auroc_shuffled"],
                "-" if entry["cohens_d"] is None else f"{entry['cohens_d']:.2f}",
            ]
        )
    return rows
