"""`steer probe apply`: texts onto vectors and probes, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import UsageError
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
    request = requests.build(Request, values)
    from steer.evaluation.probing.apply import apply
    from steer.reports import tokens as reports
    from vectors.registry.layers import parse_layers

    if not request.files:
        raise UsageError("no probe or vector is given", "steer probe apply FILE -t TEXT")
    output.require_page(request.html, request.force)
    layers = None if request.layers is None else parse_layers(request.layers)
    if request.layers is not None and layers is None:
        raise UsageError("--layers all would read every layer", "name layers, such as 12 or 8-15")
    readers = {_name(path, request.files): path for path in request.files}
    with out.progress() as on_event:
        applied = apply(
            readers, _examples(request), layers=layers, tokens="all", model=request.model, any_base=request.any_base,
            device=request.device, dtype=request.dtype, on_event=on_event,
        )  # fmt: skip
    report = reports.report(applied)
    if request.html is not None:
        output.write_page(request.html, reports.page_of(report))
        report["page"] = str(request.html)
    out.result(report, lambda: _print(report, request.html))


def _name(path: Path, files: tuple[Path, ...]) -> str:
    """A name that tells a file from the others."""
    return path.stem if sum(other.stem == path.stem for other in files) == 1 else str(path)


def _examples(request: Request) -> list[Example]:
    from probes.data.examples import Example
    from probes.data.reading import read_class

    examples = [
        # A conversation of one turn is put into the template.
        Example(text, () if request.chat else None, role="user", origin=f"--text {n}")
        for n, text in enumerate(request.texts, 1)
    ]
    if request.file is not None:
        examples += read_class(request.file, "--texts")[0]
    if not examples:
        raise UsageError("no text is given", "-t TEXT, or --texts FILE")
    return examples


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
