"""`steer diff`: the task vector of a fine-tuned model."""

from __future__ import annotations

from pathlib import Path

import click

from steer.cli import options, output


@options.command(
    summary="The task vector between a base and its fine-tuned model.",
    examples="""
    steer diff smollm2 ./poet -o poet.safetensors
    steer diff org/base org/poet -o poet.safetensors --storage lowrank:32
    steer diff org/base org/poet -o poet-lora --to-lora 16
    """,
)
@click.argument("base")
@click.argument("finetuned")
@click.option("-o", "--out", type=options.File, required=True, help="The artifact, a .safetensors file.")
@click.option("--storage", default="exact", help="exact, bf16, lowrank:R or sparse:D; all but exact state their error.")
@click.option("--to-lora", type=click.IntRange(1), help="Write a LoRA adapter of this rank, a folder, instead.")
@click.option("--threads", type=click.IntRange(1), help="How many.  [default: one for each core]")
@options.as_json
def command(
    base: str, finetuned: str, out: Path, storage: str, to_lora: int | None, threads: int | None, as_json: bool
) -> None:
    """Write what fine-tuning added to BASE, as an artifact bound to BASE by digest.

    With --storage exact, base plus vector restores every bit of the fine-tuned weights; that is verified while writing.
    """
    from merges import diff
    from merges.outputs import adapter

    output.say_preparing(base)
    with output.progress("reading") as progress:
        if to_lora is not None:
            report = adapter.from_models(base, finetuned, out, to_lora, threads=threads, progress=progress)
            _print_lora(out, report, as_json)
            return
        replaced = output.replacing(out)
        vector = diff.diff(base, finetuned, out, storage_=storage, threads=threads, progress=progress)
    output.say(replaced)
    if not vector.parameters:
        output.warn(f"{finetuned} is {base}: the vector is empty")
    size = sum(file.stat().st_size for file in vector.files)
    stored = vector.metadata["storage"]
    if as_json:
        output.print_json(
            {
                "vector": str(out),
                "digest": vector.digest,
                "files": [str(file) for file in vector.files],
                "bytes": size,
                "base": dict(vector.base),
                "storage": stored,
                "changed": len(vector.parameters),
                "unchanged": len(vector.unchanged),
            }
        )
        return
    error = stored.get("error")
    click.echo(f"storage    {stored['kind']}" + (f", relative error {error['relative']:.3g}" if error else ""))
    click.echo(f"changed    {len(vector.parameters)} of {len(vector.parameters) + len(vector.unchanged)} parameters")
    click.echo(f"wrote {out}  {size / 1e9:.2f} GB  {vector.digest}")


def _print_lora(out: Path, report: dict[str, object], as_json: bool) -> None:
    if as_json:
        output.print_json({"adapter": str(out), **report})
        return
    click.echo(f"wrote {out}, rank {report['rank']}, relative error {report['relative_error']:.3g}")
    if report["left_out"]:
        output.warn(f"a LoRA adapter can't hold the changes of {len(report['left_out'])} parameters")  # type: ignore[arg-type]
