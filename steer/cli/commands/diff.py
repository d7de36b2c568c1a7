"""`steer diff`: the task vector of a fine-tuned model, or what differs between two versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import differences, options, output, requests, versions
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.Threads):
    """The arguments and options of `steer diff`."""

    base: str | None = option(
        None, help="With --out the model before fine-tuning: " + options.A_MODEL + " Else a version.", argument=True,
        complete="models", metavar="[A]", default_text="HEAD",
    )  # fmt: skip
    finetuned: str | None = option(
        None, help="With --out the model after fine-tuning, else a version.", argument=True, complete="models",
        metavar="[B]", default_text="the working folder",
    )  # fmt: skip
    out: Path | None = option(
        None, help="The .safetensors file to write; with --to-lora, the folder. Without it, versions are compared.",
        flag=("-o", "--out"),
    )  # fmt: skip
    storage: str = option(
        "exact",
        help="How deltas are stored: exact, bf16, lowrank:R or sparse:D. The error of the last three is recorded.",
    )
    to_lora: int | None = option(None, help="Write a LoRA adapter of this rank instead.", low=1)
    allow_config: tuple[str, ...] = option(
        (), help="A setting of config.json in which the models may differ, such as rope_theta.", metavar="KEY"
    )
    exit_code: bool = option(False, help="End with 1 if the versions differ.")
    behaviour: bool = option(False, help="Compare the evaluations that are attached to two versions, item by item.")
    prompts: tuple[str, ...] = option(
        (),
        help="A prompt for both versions to answer; may be given several times.",
        flag=("-p", "--prompt"),
    )
    markdown: bool = option(False, help="Print the difference of two versions as Markdown.", flag="--md")


@options.command(
    summary="Write the task vector between two models, or compare two versions.",
    examples="""
    steer diff
    steer diff tone:v1 tone@champion
    steer diff tone~1 tone --behaviour -p "How was your day?"
    steer diff smollm2 ./poet -o poet.safetensors
    steer diff org/base org/poet -o poet.safetensors --storage lowrank:32
    steer diff org/base org/poet -o poet-lora --to-lora 16
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write the difference between the models A and B as a task vector, bound to A by its digest (with --out).

    With --storage exact, A plus vector restores the weights of B bit for bit, which is verified while writing. Without
    --out, A and B are versions of the store, and what differs between their parts is shown.
    """
    request = requests.build(Request, values)
    if request.out is None:
        _compare_versions(request)
        return
    from merges import api
    from merges.outputs import adapter
    from steer.cli.merging import print_adapter

    base, finetuned, file, threads = request.base, request.finetuned, request.out, request.threads
    if base is None or finetuned is None:
        raise UsageError("--out needs two models: that before fine-tuning, and that after it", "steer diff A B -o OUT")
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


def _compare_versions(request: Request) -> None:
    """Print what differs between two versions, or a version and the working folder."""
    from steer.store import layout, names
    from steer.store.history import behaviour
    from steer.store.history.differences import compare
    from steer.store.objects.model import read_commit, read_composition
    from steer.store.working import parts

    store = layout.find()
    if store is None:
        raise UsageError("there is no store here to compare versions of", "of two models: steer diff A B -o OUT")
    if request.to_lora is not None or request.storage != "exact" or request.allow_config or request.force:
        raise UsageError("these options are for the difference of two models", "add -o OUT")
    behaves = request.behaviour or request.prompts
    # Behaviour is that of two commits: by default of the newest, and of that before it.
    first = request.base or ("HEAD~1" if behaves and request.finetuned is None else "HEAD")
    second = request.finetuned or ("HEAD" if behaves else None)
    digests = [read_commit(store, names.resolve(store, text)).composition for text in (first, second) if text]
    before = read_composition(store, digests[0])
    after = parts.read(store)[0] if second is None else read_composition(store, digests[1])
    difference = compare(before, after)
    compared = behaviour.compare(store, *digests) if request.behaviour else []
    answers = differences.answers_of(store, (first, str(second)), request.prompts) if request.prompts else []
    value = versions.difference_value(store, difference)
    if request.behaviour:
        value["behaviour"] = [behaviour.value_of(each) for each in compared]
    if request.prompts:
        value["answers"] = answers

    def human() -> None:
        if request.markdown:
            out.line(differences.markdown(value, first, second or "the working folder"))
            return
        if difference:
            versions.print_difference(store, difference)
        else:
            out.say("no difference")
        if request.behaviour:
            differences.print_behaviour(compared, first, str(second))
        for each in answers:
            out.line(f"\n> {each['prompt']}\n")
            out.side_by_side((first, str(second)), each["answers"])

    out.result(value, human)
    if request.exit_code and difference:
        raise SystemExit(1)
