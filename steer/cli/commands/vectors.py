"""`steer vectors`: show vectors, convert them between formats, compare them, plot them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer.cli import completion, options, output
from steer.cli.output import out
from vectors.errors import ArtifactError

if TYPE_CHECKING:
    from vectors.steering import SteeringVector


@click.group()
def command() -> None:
    """Show, convert, compare and plot steering vectors."""


@options.subcommand(command, "show", "Show a vector's origin, layers and validation.")
@click.argument("file", type=options.File, help="The vector file.", shell_complete=completion.vectors)
def show(file: Path) -> None:
    """Show a vector's origin, layers and validation; of a task vector, its base and the parameters it changes."""
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
    data |= {"vector": str(file), "digest": digest, "hidden_size": vector.hidden_size, "layers": layers}
    out.result(data, lambda: _print_vector(file, vector, digest))


def _print_vector(file: Path, vector: SteeringVector, digest: str) -> None:
    from vectors.steering import spans

    measured = vector.metadata.get("measured", {})
    base, method = vector.base, vector.metadata.get("method", {})
    facts = {
        "vector": str(file),
        "digest": digest,
        "model": f"{base.get('name', base.get('architecture'))}  {base['digest']}" if base else "unknown",
        "method": method.get("name", "unknown"),
        "hidden size": str(vector.hidden_size),
        "layers": spans(vector.layers),
        "acts at": spans(vector.apply),
        "recommended": (vector.metadata.get("recommended") or {}).get("reason", ""),
        "licence": vector.metadata.get("licence", ""),
    }
    lines = [
        *facts.items(),
        *((f"parent x {p['strength']:g}", p["digest"]) for p in vector.metadata.get("parents", [])),
    ]
    out.line("\n".join(f"{key:12} {value}" for key, value in lines if value))
    rows = [
        ["*" if i in vector.apply else "", str(i), f"{norm:.2f}", *_cells(measured.get(str(i), {}))]
        for i, norm in vector.norm().items()
    ]
    out.line()
    out.table(["", "layer", "norm", "AUROC", "95 % interval", "Cohen's d"], rows)


def _cells(entry: dict[str, Any]) -> list[str]:
    auroc, low, high, effect = (entry.get(key) for key in ("auroc", "auroc_low", "auroc_high", "cohens_d"))
    return [
        "-" if auroc is None else f"{auroc:.3f}",
        "-" if low is None or high is None else f"{low:.3f} to {high:.3f}",
        "-" if effect is None else f"{effect:.2f}",
    ]


def _show_task(file: Path) -> None:
    """Show a task vector: its base, its origin, and the number of parameters it changes."""
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
    data = {**facts, "vector": str(file), "digest": vector.digest, "changed": changed, "total": total}
    out.result(data, lambda: out.line("\n".join(f"{key:12} {value}" for key, value in lines if value)))


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
    from vectors.steering import parse_layers
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


@options.subcommand(command, "compare", "Show the cosine of two vectors and their norms, layer by layer.")
@click.argument("a", type=options.File, help="The first vector file.", shell_complete=completion.vectors)
@click.argument("b", type=options.File, help="The vector file to compare it with.", shell_complete=completion.vectors)
def compare(a: Path, b: Path) -> None:
    """Show the cosine of two vectors and their norms, layer by layer."""
    from vectors.steering import SteeringVector
    from vectors.storage.files import digest_file

    left, right = SteeringVector.load(a), SteeringVector.load(b)
    cosines, norms, others = left.cosine(right), left.norm(), right.norm()
    layers = [{"layer": i, "cosine": cosine, "norm_a": norms[i], "norm_b": others[i]} for i, cosine in cosines.items()]
    rows = [[str(e["layer"]), *(f"{e[key]:.3f}" for key in ("cosine", "norm_a", "norm_b"))] for e in layers]
    out.result(
        {"a": digest_file(a), "b": digest_file(b), "layers": layers},
        lambda: out.table(["layer", "cosine", "norm A", "norm B"], rows),
    )


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
