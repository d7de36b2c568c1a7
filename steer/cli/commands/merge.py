"""`steer merge`: models, task vectors, adapters or steering vectors into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer.cli import options, output
from vectors.errors import UsageError

if TYPE_CHECKING:
    from merges.recipes.recipe import Recipe


@options.command(
    summary="Merge models, task vectors, adapters or steering vectors.",
    examples="""
    steer merge org/poet org/coder --base org/base --ties -o both/
    steer merge poet.safetensors coder.safetensors --ties --density 0.1 --scope global -o both/
    steer merge --expr "poet + 0.6*coder - 0.5*toxic" -o mixed/
    steer merge --recipe recipe.yaml -o mixed/ --dry-run
    steer merge --verify mixed/
    """,
)
@click.argument("inputs", nargs=-1)
@click.option("-o", "--out", type=options.File, help="The folder to make, or a .safetensors file for a vector.")
@click.option("--ties", is_flag=True, help="Short for --method ties.")
@click.option("--method", help="How to merge; --methods lists them.")
@click.option("--base", help="What the inputs were fine-tuned from.  [default: what the vectors record]")
@click.option("--weights", help="One for each input, such as 1,0.5.")
@click.option("--density", help="The part of each delta that is kept, in (0, 1]; one, or one for each input.")
@click.option("--lambda", "scale", type=float, help="The merged delta is multiplied by this.")
@click.option("--scope", help="tensor, or global: whether magnitudes are ranked over each tensor or the whole model.")
@click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="Another option of the method.")
@click.option("--as", "as_", help="model or vector.  [default: vector where OUT ends in .safetensors]")
@click.option(
    "--to-lora", type=click.IntRange(1), help="Write the merged delta as a LoRA adapter of this rank, a folder."
)
@click.option("--dtype", help="Of the result: auto (the base's), float32, bfloat16 or float16.")
@click.option("--expr", help='Task vectors by name: "v1 + 0.6*v2 - 0.5*toxic".')
@click.option("--recipe", type=options.File, help="A YAML file, ours or mergekit's, or the record of a finished merge.")
@click.option("--without", multiple=True, metavar="NAME", help="Leave this input of the recipe out: an exact undo.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, and stop.")
@click.option(
    "--verify",
    type=options.File,
    metavar="OUT",
    help="Compute a finished merge again, and compare every byte; --vector and --base tell where inputs lie now.",
)
@click.option("--methods", is_flag=True, help="List the methods and their options.")
@click.option("--seed", type=int, help="Where all randomness comes from.  [default: 0]")
@options.bindings
@options.merging
@options.as_json
def command(
    inputs: tuple[str, ...],
    out: Path | None,
    vectors: dict[str, Path],
    expr: str | None,
    recipe: Path | None,
    without: tuple[str, ...],
    dry_run: bool,
    verify: Path | None,
    methods: bool,
    to_lora: int | None,
    memory: int,
    threads: int | None,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Merge models, task vectors, LoRA adapters or steering vectors, streamed from disk to disk.

    Everything is checked before a weight is read. The output appears whole or not at all; the same inputs give the same
    bytes; a killed merge goes on where it was when it is run again.
    """
    from dataclasses import replace

    from merges import api
    from merges.outputs import adapter
    from merges.recipes.plan import check_output, plan
    from steer.cli.merging import print_merge, print_plan, say_notes

    if methods:
        _print_methods(as_json)
        return
    if verify is not None:
        if inputs or expr is not None or recipe is not None or out is not None:
            raise UsageError("--verify takes nothing but a finished merge", "steer merge --verify OUT")
        with output.progress("verifying") as progress:
            places = vectors | ({"base": given["base"]} if given["base"] else {})
            record = api.verify(verify, places=places, memory=memory, threads=threads, device=device, progress=progress)
        if as_json:
            output.print_json({"verified": True, "output": str(verify), **record})
        else:
            click.echo(f"{verify} is what its recipe says: {len(record['outputs'])} files, plan {record['plan']}")
        return
    if sum((bool(inputs), expr is not None, recipe is not None)) != 1:
        raise UsageError("give inputs, --expr or --recipe, one of them", "steer merge A B --base BASE --ties -o OUT")
    if out is None and not dry_run:
        raise UsageError("there is no output", "name it: -o OUT")
    made = _recipe(inputs, expr, recipe, vectors, given)
    made = api.without(made, without)
    if out is not None and out.suffix == ".safetensors" and given["as_"] is None:
        made = replace(made, as_="vector")
    if _are_steering(made):
        _merge_steering(made, out, dry_run, as_json)
        return
    if to_lora is not None:
        made = replace(made, as_="vector")
    if dry_run:
        checked = plan(made, memory=memory, threads=threads, device=device)
        if out is not None and made.as_ == "model":
            check_output(out, checked.bytes)
        print_plan(checked, out, as_json)
        return
    assert out is not None
    with output.progress("merging") as progress:
        if to_lora is not None:
            report = adapter.from_recipe(
                made, out, to_lora, memory=memory, threads=threads, device=device, progress=progress
            )
            lora_out_print(out, report, as_json)
            return
        record = api.merge(
            made, out, memory=memory, threads=threads, device=device, progress=progress, planned=say_notes
        )
    print_merge(out, record, as_json)


def lora_out_print(out: Path, report: dict[str, Any], as_json: bool) -> None:
    """What became of a merge that was written as an adapter."""
    if as_json:
        output.print_json({"adapter": str(out), **report})
        return
    click.echo(f"wrote {out}, rank {report['rank']}, relative error {report['relative_error']:.3g}")
    if report["left_out"]:
        output.warn(f"a LoRA adapter can't hold the changes of {len(report['left_out'])} parameters")


def _recipe(
    inputs: tuple[str, ...], expr: str | None, file: Path | None, vectors: dict[str, Path], given: dict[str, Any]
) -> Recipe:
    """The recipe that the arguments describe. Raises UsageError."""
    from dataclasses import replace

    from merges.recipes.recipe import Part, Recipe, names_for, read
    from steer.cli.merging import expression, numbers, settings

    method = "ties" if given["ties"] else given["method"]
    if given["ties"] and given["method"] not in (None, "ties"):
        raise UsageError(f"--ties and --method {given['method']} are two methods", "give one")
    if file is not None or expr is not None:
        taken = [f"--{name}" for name in ("ties", "method", "weights", "density") if given[name]]
        if taken:
            raise UsageError(f"{', '.join(taken)} can't be added to --recipe or --expr", "write it there")
        made = read(file) if file is not None else expression(expr or "", vectors, given["base"])
    else:
        names = names_for(list(inputs))
        references = [str(vectors.get(text, text)) for text in inputs]
        weights = numbers(given["weights"], "--weights", len(inputs))
        densities = numbers(given["density"], "--density", len(inputs))
        parts = tuple(
            Part(
                reference,
                name,
                ({"weight": weights[i]} if weights else {}) | ({"density": densities[i]} if densities else {}),
            )
            for i, (reference, name) in enumerate(zip(references, names, strict=True))
        )
        if method is None:
            raise UsageError("there is no method", "--ties, or --method NAME; --methods lists them")
        made = Recipe(method, parts)
    more = settings(given["set_"]) | ({"lambda": given["scale"]} if given["scale"] is not None else {})
    changes: dict[str, Any] = {"options": dict(made.options) | more}
    for field, value in (
        ("base", given["base"]),
        ("scope", given["scope"]),
        ("seed", given["seed"]),
        ("dtype", given["dtype"]),
        ("as_", given["as_"]),
    ):
        if value is not None:
            changes[field] = value
    return replace(made, **changes)


def _are_steering(recipe: Recipe) -> bool:
    """Whether the inputs are steering vectors. Some of them only: UsageError."""
    from vectors.task import is_task_vector

    kinds = [
        Path(part.model).is_file()
        and (Path(part.model).suffix in (".gguf", ".pt") or not is_task_vector(Path(part.model)))
        for part in recipe.parts
    ]
    if any(kinds) and not all(kinds):
        names = ", ".join(part.model for part, kind in zip(recipe.parts, kinds, strict=True) if kind)
        raise UsageError(f"{names}: steering vectors can't be merged with weights", "bake them into a model first")
    return bool(kinds) and all(kinds)


def _merge_steering(recipe: Recipe, out: Path | None, dry_run: bool, as_json: bool) -> None:
    from merges import steering
    from vectors.files import check_writable
    from vectors.steering import SteeringVector

    if out is not None:
        check_writable(out)
    found = steering.merge(recipe, [SteeringVector.load(part.model) for part in recipe.parts])
    if dry_run or out is None:
        if as_json:
            output.print_json({"layers": list(found.layers), "recipe": recipe.value()})
        else:
            click.echo(repr(found))
        return
    digest = found.save(out)
    if as_json:
        output.print_json({"vector": str(out), "digest": digest, "recipe": recipe.value()})
    else:
        click.echo(f"wrote {out}  {digest}")


def _print_methods(as_json: bool) -> None:
    from merges.methods import available

    found = available()
    if as_json:
        output.print_json(
            {
                name: {
                    "summary": method.SUMMARY,
                    "source": method.SOURCE,
                    "options": {
                        option.name: {"default": option.default, "meaning": option.meaning} for option in method.OPTIONS
                    },
                }
                for name, method in found.items()
            }
        )
        return
    for name, method in found.items():
        click.echo(f"{name:18} {method.SUMMARY}  ({method.SOURCE})")
        for option in method.OPTIONS:
            click.echo(f"    {option.name:14} {option.meaning}  [default: {option.default}]")
