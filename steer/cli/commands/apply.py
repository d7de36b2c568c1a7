"""`steer apply`: a base with task vectors on it, as a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.options import option


@dataclass(frozen=True, kw_only=True)
class Request(options.Bindings, options.Merging):
    """What `steer apply` is asked for."""

    base: str = option(help="The model that is added to: " + options.A_MODEL, argument=True, complete="models")
    what: str = option(
        help="A task vector, a LoRA adapter, or an expression over them.", argument=True, metavar="VECTOR_OR_EXPR",
        complete="vectors",
    )  # fmt: skip
    out: Path = option(help="The folder to make.", flag=("-o", "--out"))
    dtype: str = option("auto", help="The dtype of the result: auto (the base's), float32, bfloat16 or float16.")


@options.command(
    summary="Apply a task vector or an expression to a base, as a model folder.",
    examples="""
    steer apply smollm2 poet.safetensors -o poet/
    steer apply org/base "poet + 0.6*code - 0.5*toxic" -o mixed/ --vector toxic=vectors/toxic.safetensors
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write a complete Hugging Face folder: BASE plus a task vector, an adapter, or an expression over them.

    An exact vector alone restores the fine-tuned model to the bit.
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
