"""`steer extract`: a steering vector from two files of examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from steer.cli import options, output

if TYPE_CHECKING:
    from probes.directions.extraction import Extraction
    from probes.models.loading import LoadedModel


@options.command(
    summary="A steering vector from contrasting examples, judged.",
    examples="""
    steer extract --pos warm.jsonl --neg cold.jsonl
    steer extract --pairs pairs.jsonl --method whitened --layers 8-20 --out warm.safetensors
    """,
)
@click.option("--pos", type=options.File, help="Examples that show the behaviour, one JSON value a line.")
@click.option("--neg", type=options.File, help="Examples that show its opposite.")
@click.option("--pairs", type=options.File, help="One file with both classes instead.")
@click.option("--model", default="smollm2", help="A folder, a hub id (org/name@revision), or the bundled smollm2.")
@click.option("--method", default="diffmean", help="diffmean, whitened, pca or logistic.")
@click.option(
    "--layers", default="all", help="all, or such as 12, 8-15 or 3,5,12-15; layer i is the output of block i."
)
@click.option("--tokens", default="completion", help="Which count: completion, last, all, or an index such as 0 or -1.")
@click.option("--out", type=options.File, help="The .safetensors to write.  [default: named as --pos or --pairs, here]")
@click.option("--truncate", is_flag=True, help="Cut examples that exceed the model's context, instead of refusing.")
@options.devices
@options.seed
@options.as_json
def command(
    pos: Path | None,
    neg: Path | None,
    pairs: Path | None,
    model: str,
    method: str,
    layers: str,
    tokens: str,
    out: Path | None,
    truncate: bool,
    device: str,
    dtype: str,
    seed: int,
    as_json: bool,
) -> None:
    """Extract a steering vector from contrasting examples, and judge it on held-out ones.

    A line is a plain JSON string, {"text"}, {"prompt","completion"} or {"messages"}; with --pairs it is
    {"prompt","positive","negative"} or a yes/no persona statement. Each layer's direction is judged on folds it was not
    made from, against shuffled labels, and a layer and a strength are recommended.
    """
    if out is None:
        source = pos or pairs
        out = Path(f"{source.stem}.safetensors") if source is not None else None
    from steer.extraction import extract

    seen: list[LoadedModel] = []

    def loaded(ready: LoadedModel) -> None:
        seen.append(ready)
        output.say(f"model {ready.source}, on {ready.choice}")
        if out is not None:
            output.say(output.replacing(out))

    output.say_preparing(model)
    with output.progress("measuring") as progress:
        found = extract(
            pos,
            neg,
            pairs=pairs,
            model=model,
            method=method,
            layers=layers,
            tokens=tokens,
            out=out,
            seed=seed,
            truncate=truncate,
            device=device,
            dtype=dtype,
            progress=progress,
            loaded=loaded,
        )
    for note in found.notes:
        output.say(note)
    for warning in found.warnings:
        output.warn(warning)
    assert out is not None
    if as_json:
        source_of = seen[0].source
        output.print_json(
            {
                "vector": str(out),
                "digest": found.vector.digest,
                "model": model,
                "model_path": str(source_of.path),
                **found.report(),
            }
        )
        return
    click.echo(layer_table(found))
    examples, seconds = found.examples, found.seconds
    click.echo(
        f"\nrecommended: layer {found.recommended.layers[0]} (marked *), strength {found.recommended.strength:g}: "
        f"{found.recommended.reason}"
    )
    click.echo(f"wrote {out}  {found.vector.digest}")
    output.say(
        f"\n{examples['positive']} + {examples['negative']} examples, {found.tokens['computed']} tokens computed, "
        f'{seconds:.1f} s\nnext: steer try {out} -p "…"'
    )


def layer_table(found: Extraction) -> str:
    """The judgement of each layer; `*` marks those that act by default."""
    rows = []
    for entry in found.report()["layers"]:
        numbers = {key: "-" if value is None else f"{value:.3f}" for key, value in entry.items() if key != "layer"}
        rows.append(
            [
                "*" if entry["layer"] in found.recommended.layers else "",
                str(entry["layer"]),
                f"{entry['norm']:.2f}",
                numbers["auroc"],
                f"{numbers['auroc_low']} to {numbers['auroc_high']}",
                numbers["auroc_shuffled"],
                "-" if entry["cohens_d"] is None else f"{entry['cohens_d']:.2f}",
            ]
        )
    return output.table(["", "layer", "norm", "AUROC", "95 % interval", "shuffled", "Cohen's d"], rows)
