"""`steer apply`: a base with task vectors on it, as a model folder."""

from __future__ import annotations

from pathlib import Path

import click

from steer.cli import options, output


@options.command(
    summary="A model folder: a base plus a task vector or an expression.",
    examples="""
    steer apply smollm2 poet.safetensors -o poet/
    steer apply org/base "poet + 0.6*code - 0.5*toxic" -o mixed/ --vector toxic=vectors/toxic.safetensors
    """,
)
@click.argument("base")
@click.argument("what", metavar="VECTOR_OR_EXPR")
@click.option("-o", "--out", type=options.File, required=True, help="The folder to make.")
@click.option("--dtype", default="auto", help="auto (the base's), float32, bfloat16 or float16.")
@options.bindings
@options.merging
@options.as_json
def command(
    base: str,
    what: str,
    out: Path,
    dtype: str,
    vectors: dict[str, Path],
    memory: int,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Write a complete Hugging Face folder: BASE plus a task vector, an adapter, or an expression over them.

    An exact vector alone restores the fine-tuned model to the bit.
    """
    from dataclasses import replace

    from merges import api
    from steer.cli.merging import expression, print_merge, say_notes

    output.say_preparing(base)
    recipe = replace(expression(what, vectors, base), dtype=dtype)
    with output.progress("merging") as progress:
        record = api.merge(
            recipe, out, memory=memory, threads=threads, device=device, progress=progress, planned=say_notes
        )
    print_merge(out, record, as_json)
