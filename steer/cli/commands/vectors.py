"""`steer vectors`: show vectors, convert them between formats, compare them, plot them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer.cli import completion, options, output
from steer.cli.output import out
from vectors.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from vectors.steering import SteeringVector


@click.group()
def command() -> None:
    """Show, convert, compare and plot steering vectors."""


@options.subcommand(command, "show", "Show a vector's origin, layers, validation and evaluations.")
@click.argument("file", type=options.File, help="The vector file.", shell_complete=completion.vectors)
def show(file: Path) -> None:
    """Show a vector's origin, layers, validation, and the evaluations of it that stand in NAME.evaluations.json.

    Of a task vector, show its base and the parameters it changes.
    """
    from steer.evaluation.exports import references
    from vectors.steering import SteeringVector
    from vectors.storage.files import digest_file
    from vectors.task import is_task_vector

    if is_task_vector(file):
        _show_task(file)
        return
    vector = SteeringVector.load(file)
    digest = digest_file(file)
    norms = vector.norm()
    measured = vector.metadata.get("measured", {})
    layers = [{"layer": i, "norm": norm, **measured.get(str(i), {})} for i, norm in norms.items()]
    data = {key: value for key, value in vector.metadata.items() if key != "measured"}
    evaluations: list[dict[str, Any]] = []
    others = 0
    try:
        evaluations, others = references.bound_to(file, (digest, vector.digest))
    except ArtifactError as error:  # of a file beside the vector, which is whole
        out.warn(f"{error}; {error.hint}")
    data |= {"vector": str(file), "digest": digest, "hidden_size": vector.hidden_size, "layers": layers}
    data |= {"evaluations": evaluations, "evaluations_of_other_content": others}
    out.result(data, lambda: _print_vector(file, vector, digest, evaluations, others))


def _print_vector(
    file: Path, vector: SteeringVector, digest: str, evaluations: Sequence[dict[str, Any]], others: int
) -> None:
    from vectors.registry.layers import spans

    measured = vector.metadata.get("measured", {})
    base, method = vector.base, vector.metadata.get("method", {})
    run = (vector.metadata.get("recommended") or {}).get("run")
    facts = {
        "vector": str(file),
        "digest": digest,
        "model": f"{base.get('name', base.get('architecture'))}  {base['digest']}" if base else "unknown",
        "method": method.get("name", "unknown"),
        "hidden size": str(vector.hidden_size),
        "layers": spans(vector.layers),
        "acts at": spans(vector.apply),
        "recommended": _recommendation(vector),
        "by the run": f"{run}  (the `digest` in the sweep's report.json)" if run else "",
        "licence": vector.metadata.get("licence", ""),
    }
    lines = [
        *facts.items(),
        *((f"parent x {p['strength']:g}", p["digest"]) for p in vector.metadata.get("parents", [])),
        *(("evaluation", each) for each in map(_evaluation, evaluations)),
    ]
    if others:
        lines.append(("evaluations", f"{others} more of other content that the file had"))
    out.line("\n".join(f"{key:12} {value}" for key, value in lines if value))
    rows = [
        ["*" if i in vector.apply else "", str(i), f"{norm:.2f}", *_cells(measured.get(str(i), {}))]
        for i, norm in vector.norm().items()
    ]
    out.line()
    out.table(["", "layer", "norm", "AUROC", "95 % interval", "Cohen's d"], rows)


def _recommendation(vector: SteeringVector) -> str:
    """Where and how strongly the vector acts by default, and why."""
    recommended = vector.metadata.get("recommended") or {}
    strength = recommended.get("strength")
    where = f"strength {strength:g} at layer {', '.join(map(str, recommended.get('layers', [])))}: " if strength else ""
    return f"{where}{recommended.get('reason', '')}"


def _evaluation(entry: dict[str, Any]) -> str:
    """An evaluation in words: what it found, where its report was written, and the digest of that file."""
    found = entry.get("sentence") or f"{entry.get('expression')}: {entry.get('outcome')}"
    return f"{found}\n{'':12} {Path(str(entry.get('folder'))) / 'report.json'}  {entry.get('report')}"


def _cells(entry: dict[str, Any]) -> list[str]:
    auroc, low, high, effect = (entry.get(key) for key in ("auroc", "auroc_low", "auroc_high", "cohens_d"))
    return [
        "-" if auroc is None else f"{auroc:.3f}",
        "-" if low is None or high is None else f"{low:.3f} to {high:.3f}",
        "-" if effect is None else f"{effect:.2f}",
    ]


def _show_task(file: Path) -> None:
    """Show a task vector: its base, its origin, the number of parameters it changes, and the norms of the changes."""
    from steer.evaluation.task_vectors import by_layer, norms
    from vectors.task import TaskVector

    vector = TaskVector.open(file)
    facts = {key: value for key, value in vector.metadata.items() if key not in ("parameters", "unchanged")}
    changed, total = len(vector.parameters), len(vector.parameters) + len(vector.unchanged)
    model, method = facts.get("model") or {}, facts.get("method") or {}
    lines = [
        ("task vector", str(file)),
        ("digest", vector.digest),
        ("base", f"{vector.base.get('name') or vector.base.get('architecture')}  {vector.base['digest']}"),
        ("model", model.get("digest", "")),
        ("method", method.get("name", "")),
        ("storage", vector.storage),
        ("changes", f"{changed} of {total} parameters"),
        ("licence", facts.get("licence", "")),
        *((f"parent {parent.get('name', '')}", parent.get("identity", "")) for parent in facts.get("parents", [])),
    ]
    of_layers = by_layer(norms(vector))
    norm = math.sqrt(sum(each**2 for each in of_layers.values()))
    lines.insert(-1 if lines[-1][0] == "licence" else len(lines), ("norm", f"{norm:.3f}"))
    data = {**facts, "vector": str(file), "digest": vector.digest, "changed": changed, "total": total}
    data |= {"norm": norm, "layers": [{"layer": layer, "norm": each} for layer, each in of_layers.items()]}

    def human() -> None:
        out.line("\n".join(f"{key:12} {value}" for key, value in lines if value) + "\n")
        out.table(["layer", "norm"], [[layer, f"{each:.3f}"] for layer, each in of_layers.items()])

    out.result(data, human)


@options.subcommand(command, "convert", "Write a vector in another format.")
@click.argument("file", type=options.File, help="The vector file.", shell_complete=completion.vectors)
@click.argument("target", metavar="OUT", type=options.File, help="The file to write.")
@click.option(
    "--format",
    "format_",
    help="The format to write.  [default: by the suffix of OUT]",
    shell_complete=completion.formats,
)
@click.option(
    "--layers",
    help="The layers to write: all, acting, or a list such as 8-15.  [default: all to .safetensors, else acting]",
)
@click.option(
    "--first-row", type=click.Choice(("embeddings", "block-0")),
    help="What the first row of a .pt stack of rows by layer holds, which the file does not record.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def convert(
    file: Path, target: Path, format_: str | None, layers: str | None, first_row: str | None, force: bool
) -> None:
    """Write a vector in another format: artifact, llama.cpp GGUF, or the `.pt` of other tools.

    Other tools apply every layer of a file, so their formats get only the layers that act, unless --layers is given.
    """
    from vectors import formats
    from vectors.registry.layers import parse_layers
    from vectors.storage.files import require_distinct, require_writable

    vector = formats.read(file, first_row)
    if vector.rows is not None:
        raise ArtifactError(
            f"{file} is a stack of {vector.rows} rows that does not say whether its first row is the embeddings "
            "(as in Persona Vectors and transformers' hidden_states) or the output of block 0",
            "say it: --first-row embeddings, or --first-row block-0",
        )
    require_distinct(target, {"FILE": file})
    if layers is None:
        layers = "all" if format_ in (None, "native") and target.suffix == ".safetensors" else "acting"
    if layers == "acting":
        vector = vector.select(vector.apply)
    elif (named := parse_layers(layers)) is not None:
        vector = vector.select(named)
    output.require_absent(target, force)
    require_writable(target)
    replaced = output.replacing(target)
    digest = formats.write(vector, target, format_)
    out.say(replaced)
    out.result({"vector": str(target), "digest": digest}, lambda: out.line(f"wrote {target}  {digest}"))


@options.subcommand(command, "compare", "Show the cosines and norms of vectors, layer by layer.")
@click.argument(
    "files", type=options.File, nargs=-1, required=True, help="Two or more vector files.",
    shell_complete=completion.vectors,
)  # fmt: skip
def compare(files: tuple[Path, ...]) -> None:
    """Show the cosines and norms of vectors: of steering vectors layer by layer, of task vectors over all weights."""
    from vectors.task import is_task_vector

    if len(files) < 2:
        raise UsageError(f"there is nothing to compare {files[0]} with", "name two or more vector files")
    tasks = [is_task_vector(file) for file in files]
    if all(tasks):
        _compare_tasks(files)
    elif any(tasks):
        names = ", ".join(str(file) for file, task in zip(files, tasks, strict=True) if task)
        raise UsageError(f"{names}: task vectors can't be compared with steering vectors", "compare either kind alone")
    else:
        _compare_steering(files)


def _compare_steering(files: Sequence[Path]) -> None:
    from itertools import combinations

    from vectors.steering import SteeringVector
    from vectors.storage.files import digest_file

    vectors = [SteeringVector.load(file) for file in files]
    norms = [vector.norm() for vector in vectors]
    pairs: list[dict[str, Any]] = []
    for i, j in combinations(range(len(files)), 2):
        layers = [
            {"layer": layer, "cosine": cosine, "norm_a": norms[i][layer], "norm_b": norms[j][layer]}
            for layer, cosine in vectors[i].cosine(vectors[j]).items()
        ]
        pairs.append({"a": digest_file(files[i]), "b": digest_file(files[j]), "layers": layers})
    names = [chr(ord("A") + i) if len(files) <= 26 else str(i + 1) for i in range(len(files))]

    def human() -> None:
        if len(files) > 2:
            out.line("\n".join(f"{name}  {file}" for name, file in zip(names, files, strict=True)) + "\n")
        cosines = [{entry["layer"]: entry["cosine"] for entry in pair["layers"]} for pair in pairs]
        shared = sorted({layer for each in cosines for layer in each})
        heads = [f"{names[i]}·{names[j]}" for i, j in combinations(range(len(files)), 2)]
        header = ["layer", *(["cosine"] if len(files) == 2 else heads), *(f"norm {name}" for name in names)]
        rows = [
            [str(layer), *(_number(each.get(layer)) for each in cosines), *(_number(each.get(layer)) for each in norms)]
            for layer in shared
        ]
        out.table(header, rows)

    data = pairs[0] if len(files) == 2 else {"files": [str(file) for file in files], "pairs": pairs}
    out.result(data, human)


def _compare_tasks(files: Sequence[Path]) -> None:
    from steer.evaluation.task_vectors import cosines, norms
    from vectors.task import TaskVector

    vectors = [TaskVector.open(file) for file in files]
    matrix = cosines(vectors)
    lengths = [math.sqrt(sum(norm**2 for norm in norms(vector).values())) for vector in vectors]
    rows = [
        [str(file), f"{length:.3f}", *map(_number, row)]
        for file, length, row in zip(files, lengths, matrix, strict=True)
    ]
    data = {
        "files": [
            {"vector": str(file), "digest": vector.digest, "norm": length}
            for file, vector, length in zip(files, vectors, lengths, strict=True)
        ],
        "cosines": matrix,
    }
    out.result(data, lambda: out.table(["", "norm", *(f"cosine to {file.stem}" for file in files)], rows, left=1))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


@options.subcommand(command, "plot", "Plot how well each layer separates the classes.")
@click.argument("file", type=options.File, help="The vector file.", shell_complete=completion.vectors)
@click.option(
    "-o", "--out", "picture", type=options.File, help="The picture to write, .png or .svg.  [default: FILE with .png]"
)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def plot(file: Path, picture: Path | None, force: bool) -> None:
    """Plot how well each layer separates the classes, on held-out examples and with shuffled labels."""
    from steer.reports.plots import layer_separation
    from vectors.steering import SteeringVector
    from vectors.storage.files import require_writable

    vector: SteeringVector = SteeringVector.load(file)
    if not vector.metadata.get("measured"):
        raise ArtifactError(f"{file} holds no validation to plot", "extract it with `steer extract`")
    target = picture or file.with_suffix(".png")
    output.require_absent(target, force)
    require_writable(target)
    replaced = output.replacing(target)
    layer_separation(vector, target, title=file.stem)
    out.say(replaced)
    out.result({"picture": str(target)}, lambda: out.line(f"wrote {target}"))
