"""`steer probe train`: train a linear probe on two files of examples."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import SteerError, collecting
from vectors.registry import plugins
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.readouts.training import Trained

SITE = (
    "Where activations are read: resid_post (the output of blocks), or with the extra `lens` resid_pre, resid_mid, "
    "attn_out, mlp_out, head, head:N, or a hook of TransformerLens such as 'blocks.{layer}.attn.hook_q'."
)


def methods() -> list[str]:
    """The names of the methods."""
    return plugins.names("probes.readouts.methods", "steer.probe_methods")


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.Devices, options.Seeded):
    """The options of `steer probe train`."""

    pos: Path | None = option(None, help="Examples of the positive class, one JSON value per line.")
    neg: Path | None = option(None, help="Examples of the negative class.")
    pairs: Path | None = option(None, help="One file that holds both classes, instead of --pos and --neg.")
    model: str = option("smollm2", help=options.MODEL, complete="models")
    method: str = option("logistic", help="The method that fits a readout to activations: {names}.", names=methods)
    layers: str = option("all", help="The layers to read: all, or a list such as 3,5,12-15.")
    tokens: str = option("completion", help=options.TOKENS)
    per_token: bool = option(False, help="Fit to every token that counts, instead of the mean of each example.")
    pool: str = option(
        "mean", help="How the score of a text follows from those of its tokens; max needs --per-token.",
        choices=("mean", "max", "last"),
    )  # fmt: skip
    site: str = option(RESIDUAL, help=SITE)
    out: Path | None = option(
        None, help="The .safetensors file to write.", flag=("-o", "--out"),
        default_text="the name of --pos or --pairs with -probe, in the current folder",
    )  # fmt: skip
    truncate: bool = option(False, help="Cut examples that exceed the model's context, instead of refusing them.")


@options.command(
    "train",
    summary="Train a linear probe on contrasting examples.",
    examples="""
    steer probe train --pos warm.jsonl --neg cold.jsonl
    steer probe train --pairs pairs.jsonl --method lda --tokens prompt --layers 4-12 -o asks.safetensors
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Train a linear probe at each layer, calibrated to log-odds, and measure it on held-out folds.

    Files are as of `steer extract`. Copies of a text, and texts with the same prompt, are never on both sides of a
    fold. The layer with the least held-out cross-entropy is recommended; `steer probe test` measures it on other data.
    """
    source = values["pos"] or values["pairs"]
    if values["out"] is None and source is not None:
        values["out"] = Path(f"{source.stem}-probe.safetensors")
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.probing.train import train
    from vectors.storage.files import require_distinct

    replacing = ""
    if request.out is not None:
        with collecting(errors):
            require_distinct(request.out, {"--pos": request.pos, "--neg": request.neg, "--pairs": request.pairs})
            output.require_absent(request.out, request.force)
        replacing = output.replacing(request.out)
    output.say_preparing(request.model)
    arguments = {name: value for name, value in vars(request).items() if name != "force"}
    with out.progress() as on_event:
        trained = train(**arguments, errors=errors, on_event=on_event)
    out.say(replacing)
    for note in trained.notes:
        out.say(note)
    for warning in trained.warnings:
        out.warn(warning)
    assert request.out is not None
    file = request.out
    data = {"probe": str(file), "digest": trained.probe.digest, "model": request.model, **trained.report()}
    out.result(data, lambda: _print(trained, file, request.model))


def _print(trained: Trained, file: Path, model: str) -> None:
    from steer.reports.probes import CALIBRATION, calibration_rows

    best = trained.probe.layer
    rows = [
        [
            "*" if layer == best else "",
            str(layer),
            output.figure(each.auroc),
            f"{output.figure(each.auroc_low)} to {output.figure(each.auroc_high)}",
            output.figure(each.brier),
            output.figure(each.cross_entropy),
            output.figure(each.calibration_error),
        ]
        for layer, each in trained.figures.items()
    ]
    out.line("held out, in five folds:")
    out.table(["", "layer", "AUROC", "95 % interval", "Brier", "cross-entropy", "calibration error"], rows)
    confusion = trained.figures[best].confusion
    out.line(f"\nlayer {best} at score 0: {confusion.sentence()}")
    if trained.curve:
        out.line("calibration of its probabilities:")
        out.table(CALIBRATION, calibration_rows(trained.curve))
    recommended = trained.probe.metadata["recommended"]
    out.line(f"\nrecommended: layer {best} (marked *): {recommended['reason']}")
    out.line(f"wrote {file}  {trained.probe.digest}")
    out.say(
        f"\n{trained.examples['positive']} + {trained.examples['negative']} examples, {trained.seconds:.1f} s\n"
        f'next: steer probe apply {shlex.quote(str(file))}{output.next_model(model)} -t "…"'
    )
