"""`steer merge`: merge models, task vectors, adapters or steering vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests, versions
from steer.cli.output import out
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.registry import plugins
from vectors.registry.options import option

if TYPE_CHECKING:
    from merges.recipes.recipe import Recipe


def method_names() -> list[str]:
    """The names of the merge methods."""
    return plugins.names("merges.methods", "steer.merge_methods")


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.Bindings, options.Merging):
    """The arguments and options of `steer merge`."""

    inputs: tuple[str, ...] = option(
        (),
        help="Models, task vectors, adapters or steering vectors.",
        argument=True,
        metavar="[INPUTS]...",
        complete="inputs",
    )
    out: Path | None = option(
        None, help="The model folder to write, or a .safetensors file for a vector.", flag=("-o", "--out")
    )
    ties: bool = option(False, help="Short for --method ties.")
    method: str | None = option(None, help="The merge method: {names}.", names=method_names, metavar="NAME")
    base: str | None = option(
        None,
        help="The model that the inputs were fine-tuned from.",
        default_text="the base that the vectors record",
        complete="models",
    )
    weights: str | None = option(None, help="The weights of the inputs, such as 1,0.5; one number counts for all.")
    density: str | None = option(
        None, help="The share of each delta to keep, from 0 to 1; one number for all inputs, or one for each."
    )
    scale: float | None = option(None, help="The factor that multiplies the merged delta.", flag="--lambda")
    scope: str | None = option(
        None, help="How magnitudes are ranked: within each tensor (tensor), or over the whole model (global)."
    )
    settings: tuple[str, ...] = option(
        (), help="Any option of the method; --list-options lists them.", flag="--set", metavar="NAME=VALUE"
    )
    as_: str | None = option(
        None, help="What to write: model or vector.", default_text="vector if OUT ends in .safetensors, else model"
    )
    to_lora: int | None = option(None, help="Write the merged delta as a LoRA adapter of this rank.", low=1)
    dtype: str | None = option(None, help="The dtype of the result: auto (the base's), float32, bfloat16 or float16.")
    expr: str | None = option(None, help='An expression over task vectors by name: "v1 + 0.6*v2 - 0.5*toxic".')
    recipe: Path | None = option(None, help="A YAML recipe of steer or mergekit, or the run.json of a finished merge.")
    without: tuple[str, ...] = option(
        (), help="Leave out this input of the recipe, which undoes its part in the merge exactly.", metavar="NAME"
    )
    dry_run: bool = option(False, help="Check everything, print the plan, and exit.")
    verify: Path | None = option(
        None,
        help="Compute a finished merge again and compare every byte; --vector and --base give moved inputs.",
        metavar="OUT",
    )
    methods: bool = option(False, help="List the methods and their options, and exit.")
    list_options: bool = option(
        False, help="List the options of the chosen method, with default, range and meaning, and exit."
    )
    seed: int | None = option(None, help="The random seed.", default_text="0")
    tokenizer: str | None = option(
        None, help="Match rows of embeddings by token, for base's tokenizer (base), that of all (union), or of MODEL."
    )
    allow_config: tuple[str, ...] = option(
        (), help="A setting of config.json in which the inputs may differ, such as rope_theta.", metavar="KEY"
    )
    message: str = option("", help="The message of the new version.", flag=("-m", "--message"), group="Versions",
                          metavar="TEXT", default_text="Merge VERSION")  # fmt: skip
    take: str | None = option(
        None, help="Settle what changed on both sides: ours or theirs.", group="Versions", choices=("ours", "theirs")
    )


@options.command(
    summary="Merge models, task vectors, adapters or steering vectors; or a version into the current branch.",
    examples="""
    steer merge calmer
    steer merge org/poet org/coder --base org/base --ties -o both/
    steer merge poet.safetensors coder.safetensors --ties --density 0.1 --scope global -o both/
    steer merge --expr "poet + 0.6*coder - 0.5*toxic" -o mixed/
    steer merge --recipe recipe.yaml -o mixed/ --dry-run
    steer merge --verify mixed/
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Merge models, task vectors, LoRA adapters or steering vectors, streamed from disk to disk.

    All inputs are checked before any weight is read. The output is complete or absent; the same inputs give the same
    bytes. The same command resumes a killed merge.
    """
    request = requests.build(Request, values)
    if request.methods:
        _print_methods()
    elif request.list_options:
        from merges.methods import find

        name = _method(request)
        options.print_options(name, find(name).options)
    elif request.verify is not None:
        _verify(request, request.verify)
    elif not _merge_version(request):
        _merge(request)


def _merge_version(request: Request) -> bool:
    """Merge a version of the store into the current branch, if that is what was typed: one input, and no output."""
    if request.out is not None or len(request.inputs) != 1 or request.expr or request.recipe or request.dry_run:
        return False
    from steer.store import layout, names
    from steer.store.combine import merge_commit

    store = layout.find()
    if store is None:
        return False
    name = request.inputs[0]
    result = merge_commit(store, names.resolve(store, name), name, request.message, versions.typed(), take=request.take)
    if result.commit is None:
        out.result({"version": None}, lambda: out.line(f"{name} is merged already"))
        return True
    how = "moved forward to" if result.forward else "merged:"
    sentence = f"{how} {names.short(result.commit.digest)}  {result.commit.title}"
    out.result(versions.commit_value(result.commit), lambda: out.line(sentence))
    return True


def _verify(request: Request, folder: Path) -> None:
    """Compute a finished merge again, and compare its bytes."""
    from merges import api

    if request.inputs or request.expr is not None or request.recipe is not None or request.out is not None:
        raise UsageError(
            "--verify takes no inputs, --expr, --recipe or --out beside the finished merge", "steer merge --verify OUT"
        )
    paths = dict(request.vectors) | ({"base": Path(request.base)} if request.base else {})
    with out.progress() as on_event:
        record = api.verify(folder, paths=paths, **_resources(request), on_event=on_event)
    sentence = f"{folder} matches its recipe: {len(record['outputs'])} files, plan {record['plan']}"
    out.result({"verified": True, "output": str(folder), **record}, lambda: out.line(sentence))


def _merge(request: Request) -> None:
    """Plan, and write unless it is a dry run."""
    from merges import api
    from merges.outputs import adapter
    from merges.recipes.plan import plan
    from steer.cli.merging import print_adapter, print_merge, print_plan
    from vectors.storage.folders import require_free_output

    if sum((bool(request.inputs), request.expr is not None, request.recipe is not None)) != 1:
        raise UsageError("give exactly one of inputs, --expr and --recipe", "steer merge A B --base BASE --ties -o OUT")
    if request.out is None and not request.dry_run:
        raise UsageError("no output is given", "add -o OUT")
    errors: list[SteerError] = []
    recipe = _recipe(request, errors)
    with collecting(errors):
        recipe = recipe.without(*request.without)
    if request.out is not None and not request.dry_run:
        with collecting(errors):
            output.require_absent(request.out, request.force)
    if request.out is not None and request.out.suffix == ".safetensors" and request.as_ is None:
        recipe = replace(recipe, as_="vector")
    are_steering = False
    with collecting(errors):
        are_steering = _are_steering(recipe)
    if are_steering:
        raise_together(errors)
        _merge_steering(recipe, request.out, request.dry_run)
        return
    if request.to_lora is not None:
        recipe = replace(recipe, as_="vector")
    if errors:  # what is wrong with the inputs and the output is reported with them
        if request.out is not None and recipe.as_ == "model":
            with collecting(errors):
                require_free_output(request.out)
        with collecting(errors), out.progress() as on_event:
            plan(recipe, **_resources(request), on_event=on_event)
    raise_together(errors)
    if request.dry_run:
        with out.progress() as on_event:
            planned = plan(recipe, **_resources(request), on_event=on_event)
        if request.out is not None and recipe.as_ == "model":
            require_free_output(request.out, planned.bytes)
        print_plan(planned)
        return
    assert request.out is not None
    with out.progress() as on_event:
        if request.to_lora is not None:
            report = adapter.from_recipe(recipe, request.out, request.to_lora, **_resources(request), on_event=on_event)
        else:
            record = api.merge(recipe, request.out, **_resources(request), on_event=on_event)
    if request.to_lora is not None:
        print_adapter(request.out, report)
    else:
        print_merge(request.out, record)


def _resources(request: Request) -> dict[str, Any]:
    return {"memory": request.memory, "threads": request.threads, "device": request.device}


def _method(request: Request) -> str:
    """The name of the chosen method. Raises UsageError when none or two are given."""
    if request.ties and request.method not in (None, "ties"):
        raise UsageError(f"--ties and --method {request.method} name two methods", "give one of them")
    name = "ties" if request.ties else request.method
    if name is None:
        raise UsageError("no method is given", "add --ties or --method NAME; --methods lists the methods")
    return name


def _recipe(request: Request, errors: list[SteerError]) -> Recipe:
    """The recipe that the arguments describe; what is wrong with them is left out, and appended to `errors`.

    Raises the error of an expression or a file that can't be read at all.
    """
    from merges.recipes import expression
    from merges.recipes.document import draft
    from merges.recipes.recipe import Part, Recipe, Tokenizer, names_for
    from steer.cli.merging import numbers
    from vectors.registry.values import read_assignments

    if request.recipe is not None or request.expr is not None:
        replaced = {
            "ties": request.ties,
            "method": request.method,
            "weights": request.weights,
            "density": request.density,
        }
        given = [f"--{name}" for name, value in replaced.items() if value]
        if given:
            errors.append(
                UsageError(
                    f"{', '.join(given)} can't be combined with --recipe or --expr",
                    "set it in the recipe or the expression",
                )
            )
        if request.recipe is not None:
            recipe = draft(request.recipe)
        else:
            # Where names are missing, the base and the options are checked nevertheless, with the base in their place.
            recipe = Recipe("task_arithmetic", (Part(request.base or "", "base"),))
            with collecting(errors):
                recipe = expression.read(request.expr or "", request.vectors, request.base)
            if not request.base:
                raise_together(errors)
    else:
        inputs = request.inputs
        recipes = [text for text in inputs if Path(text).suffix in (".yml", ".yaml") or Path(text).name == "run.json"]
        if recipes:
            raise UsageError(f"{recipes[0]} is a recipe, not an input", f"steer merge --recipe {recipes[0]} -o OUT")
        method, count = "", len(inputs)
        weights: Sequence[float | None] = [None] * count
        densities: Sequence[float | None] = [None] * count
        with collecting(errors):
            method = _method(request)
        with collecting(errors):
            weights = numbers(request.weights, "--weights", count) or weights
        with collecting(errors):
            densities = numbers(request.density, "--density", count) or densities
        parts = tuple(
            Part(
                str(request.vectors.get(text, text)),
                name,
                {key: value for key, value in (("weight", weight), ("density", density)) if value is not None},
            )
            for text, name, weight, density in zip(inputs, names_for(list(inputs)), weights, densities, strict=True)
        )
        unnamed = () if method else ("no method is given",)
        recipe = Recipe(method, parts, problems=unnamed)
    more: dict[str, Any] = {"lambda": request.scale} if request.scale is not None else {}
    with collecting(errors):
        more = read_assignments(request.settings) | more
    options_ = {name: getattr(request, name) for name in ("base", "scope", "seed", "dtype", "as_")}
    changes = {name: value for name, value in options_.items() if value is not None}
    if request.tokenizer is not None:
        changes["tokenizer"] = Tokenizer(request.tokenizer)
    if request.allow_config:
        changes["allow_config"] = tuple(dict.fromkeys((*recipe.allow_config, *request.allow_config)))
    return replace(recipe, options=dict(recipe.options) | more, **changes)


def _are_steering(recipe: Recipe) -> bool:
    """Whether all inputs are steering vectors. Raises UsageError when only some are."""
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


def _merge_steering(recipe: Recipe, file: Path | None, dry_run: bool) -> None:
    from merges import steering
    from vectors.steering import SteeringVector
    from vectors.storage.files import require_writable

    if file is not None:
        require_writable(file)
    with out.progress() as on_event:
        vectors = [SteeringVector.load(part.model) for part in recipe.parts]
        vector = steering.merge(recipe, vectors, on_event=on_event)
    if dry_run or file is None:
        out.result({"layers": list(vector.layers), "recipe": recipe.value()}, lambda: out.line(repr(vector)))
        return
    digest = vector.save(file)
    data = {"vector": str(file), "digest": digest, "recipe": recipe.value()}
    out.result(data, lambda: out.line(f"wrote {file}  {digest}"))


def _print_methods() -> None:
    from merges.methods import available

    methods = available()
    data = {
        name: {
            "summary": method.summary,
            "source": method.source,
            "options": {o.name: {"default": o.default, "meaning": o.meaning} for o in method.options},
        }
        for name, method in methods.items()
    }

    def human() -> None:
        for name, method in methods.items():
            out.line(f"{name:18} {method.summary}  ({method.source})")
            for o in method.options:
                out.line(f"    {o.name:14} {o.meaning}  [default: {o.default}]")

    out.result(data, human)
