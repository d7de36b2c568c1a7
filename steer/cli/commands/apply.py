"""`steer apply`: add task vectors to a base model, and write the result as a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(options.Bindings, options.Merging):
    """The arguments and options of `steer apply`."""

    base: str = option(help="The base model: " + options.A_MODEL, argument=True, complete="models")
    what: str = option(
        help="A task vector, a LoRA adapter, or an expression over them.", argument=True, metavar="VECTOR_OR_EXPR",
        complete="vectors",
    )  # fmt: skip
    out: Path = option(help="The model folder to write.", flag=("-o", "--out"))
    dtype: str = option("auto", help="The dtype of the result: auto (the base's), float32, bfloat16 or float16.")


@options.command(
    summary="Add task vectors to a base model, and write a model folder.",
    examples="""
    steer apply smollm2 poet.safetensors -o poet/
    steer apply org/base "poet + 0.6*code - 0.5*toxic" -o mixed/ --vector toxic=vectors/toxic.safetensors
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write a complete Hugging Face folder: BASE plus a task vector, an adapter, or an expression over them.

    One task vector with exact storage, at strength 1, restores the fine-tuned model bit for bit.
    """
    request = requests.build(Request, values)
    from merges import api
    from steer.cli.merging import print_merge

    output.say_preparing(request.base)
    with out.progress() as on_event:
        record = api.apply(
            request.base, request.what, request.out, vectors=request.vectors, dtype=request.dtype,
            memory=request.memory, threads=request.threads, device=request.device,
            on_event=on_event,
        )  # fmt: skip
    print_merge(request.out, record)
