"""`steer diff`: write the task vector of a fine-tuned model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.Threads):
    """The arguments and options of `steer diff`."""

    base: str = option(help="The model before fine-tuning: " + options.A_MODEL, argument=True, complete="models")
    finetuned: str = option(help="The model after fine-tuning.", argument=True, complete="models")
    out: Path = option(help="The .safetensors file to write; with --to-lora, the folder.", flag=("-o", "--out"))
    storage: str = option(
        "exact",
        help="How deltas are stored: exact, bf16, lowrank:R or sparse:D. The error of the last three is recorded.",
    )
    to_lora: int | None = option(None, help="Write a LoRA adapter of this rank instead.", low=1)
    allow_config: tuple[str, ...] = option(
        (), help="A setting of config.json in which the models may differ, such as rope_theta.", metavar="KEY"
    )


@options.command(
    summary="Write the task vector between a base and its fine-tuned model.",
    examples="""
    steer diff smollm2 ./poet -o poet.safetensors
    steer diff org/base org/poet -o poet.safetensors --storage lowrank:32
    steer diff org/base org/poet -o poet-lora --to-lora 16
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write the difference between FINETUNED and BASE as a task vector, bound to BASE by its digest.

    With --storage exact, base plus vector restores the fine-tuned weights bit for bit, which is verified while writing.
    """
    request = requests.build(Request, values)
    from merges import api
    from merges.outputs import adapter
    from steer.cli.merging import print_adapter

    base, finetuned, file, threads = request.base, request.finetuned, request.out, request.threads
    output.say_preparing(base)
    if request.to_lora is not None:
        with out.progress() as on_event:
            report = adapter.from_models(
                base, finetuned, file, request.to_lora, threads=threads, allow_config=request.allow_config,
                on_event=on_event,
            )  # fmt: skip
        print_adapter(file, report)
        return
    output.require_absent(file, request.force)
    replaced = output.replacing(file)
    with out.progress() as on_event:
        vector = api.diff(
            base, finetuned, file, storage_=request.storage, threads=threads, allow_config=request.allow_config,
            on_event=on_event,
        )  # fmt: skip
    out.say(replaced)
    if not vector.parameters:
        out.warn(f"{finetuned} and {base} have the same weights: the vector is empty")
    size = sum(part.stat().st_size for part in vector.files)
    changed, unchanged, stored = len(vector.parameters), len(vector.unchanged), vector.metadata["storage"]

    def human() -> None:
        error = stored.get("error")
        out.line(f"storage    {stored['kind']}" + (f", relative error {error['relative']:.3g}" if error else ""))
        out.line(f"changed    {changed} of {changed + unchanged} parameters")
        out.line(f"wrote {file}  {size / 1e9:.2f} GB  {vector.digest}")

    out.result(
        {
            "vector": str(file), "digest": vector.digest, "files": [str(part) for part in vector.files], "bytes": size,
            "base": dict(vector.base), "storage": stored, "changed": changed, "unchanged": unchanged,
        },
        human,
    )  # fmt: skip
