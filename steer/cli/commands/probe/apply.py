"""`steer probe apply`: texts onto vectors and probes, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import SteerError, UsageError, collecting
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.data.examples import Example


@dataclass(frozen=True, kw_only=True)
class Request(options.Force, options.AnyBase, options.Devices):
    """The arguments and options of `steer probe apply`."""

    files: tuple[Path, ...] = option(help="One or more files of probes and vectors.", argument=True, complete="vectors")
    texts: tuple[str, ...] = option((), help="A text; may be given several times.", flag=("-t", "--text"))
    file: Path | None = option(
        None, help="A file of examples, one JSON value per line, as of `steer extract`.", flag="--texts"
    )
    chat: bool = option(False, help="Put each --text into the model's chat template, as a user's turn.")
    layers: str | None = option(
        None, help="The layers to read, such as 12 or 8-15.",
        default_text="where a vector acts; the one that a probe recommends",
    )  # fmt: skip
    model: str | None = option(None, help=options.MODEL, default_text="the model they were made on", complete="models")
    html: Path | None = option(None, help="A page to write, in .html.")


@options.command(
    "apply",
    summary="Read texts by vectors or probes, token by token.",
    examples="""
    steer probe apply warm-probe.safetensors -t "Oh dear, I hope you feel better soon."
    steer probe apply warm.safetensors formal.safetensors --texts answers.jsonl --html read.html
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Read texts by vectors or probes, token by token: coloured on a terminal and in --html, as figures in a pipe.

    Of a probe a value is the score of a token, the log-odds of the positive class. Of a vector it is the component
    along it, in mean displacements: 1 is what strength 1 adds. Colours count from a probe's threshold, and from a
    vector's mean over the texts.
    """
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.probing.apply import apply
    from steer.evaluation.probing.inputs import examples_of
    from steer.reports import tokens as reports

    if not request.files:
        errors.append(UsageError("no probe or vector is given", "steer probe apply FILE -t TEXT"))
    with collecting(errors):
        output.require_page(request.html, request.force)
    if request.layers is not None and request.layers.strip() == "all":
        errors.append(UsageError("--layers all would read every layer", "name layers, such as 12 or 8-15"))
    examples: list[Example] = []
    with collecting(errors):
        if not request.texts and request.file is None:
            raise UsageError("no text is given", "-t TEXT, or --texts FILE")
        examples = examples_of(request.texts, request.file, chat=request.chat)
    readers = {_name(path, request.files): path for path in request.files}
    with out.progress() as on_event:
        applied = apply(
            readers, examples, layers=request.layers, tokens="all", model=request.model, any_base=request.any_base,
            device=request.device, dtype=request.dtype, errors=errors, on_event=on_event,
        )  # fmt: skip
    report = reports.report(applied)
    if request.html is not None:
        output.write_page(request.html, reports.page_of(report))
        report["page"] = str(request.html)
    out.result(report, lambda: _print(report, request.html))


def _name(path: Path, files: tuple[Path, ...]) -> str:
    """A name that tells a file from the others."""
    return path.stem if sum(other.stem == path.stem for other in files) == 1 else str(path)


def _print(report: Mapping[str, Any], page: Path | None) -> None:
    for reader in report["readers"]:
        for number, text in enumerate(report["texts"]):
            if len(report["readers"]) + len(report["texts"]) > 2:
                out.line(f"{reader['name']}, layer {reader['layer']}, text {number + 1}:")
            cells = [(token["token"], token["values"][reader["column"]], token["counts"]) for token in text["tokens"]]
            out.coloured(cells, reader["centre"], reader["range"])
        out.line(f"\n{reader['name']}, layer {reader['layer']}: {reader['unit']}")
    if page is not None:
        out.line(f"wrote {page}")
