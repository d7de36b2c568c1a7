"""`steer ab export`: the rows of an experiment, or its demonstrations as training data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, output, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named, options.Force):
    """The arguments and options of `steer ab export`."""

    version: int | None = option(None, help="The version of the experiment.", low=1, default_text="all of them")
    out: Path = option(help="The file to write, one JSON object a line.", flag=("-o", "--out"))
    demonstrations: bool = option(False, help="Write the better answers that clients sent, for steer bake.")
    as_: str = option(
        "pairs",
        help="Demonstrations against the answers that were served, for --pairs; or by themselves, for --data.",
        flag="--as", choices=("pairs", "data"),
    )  # fmt: skip


@options.command(
    "export",
    summary="Write the rows of an experiment, or its demonstrations as training data for steer bake.",
    examples="""
    steer ab export tone -o tone.jsonl
    steer ab export tone --demonstrations -o pairs.jsonl && steer bake --mode prefer --pairs pairs.jsonl -o better/
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write the rows of an experiment, or its demonstrations as training data for steer bake.

    A demonstration needs its prompt, and a pair the answer that was served: the log holds them if the experiment stores
    texts; a client can send the prompt with the demonstration.
    """
    from steer.experiments import exports
    from vectors.storage.files import new_file

    request = requests.build(Request, values)
    output.require_absent(request.out, request.force)
    form = exports.pair if request.as_ == "pairs" else exports.example
    written = left_out = 0
    with _log.opened(request.experiment) as log, new_file(request.out) as file:
        name = log.address.name
        lines: Iterator[Mapping[str, Any] | None] = (
            map(form, exports.demonstrations(log.engine, name))
            if request.demonstrations
            else exports.rows(log.engine, name, request.version)
        )
        for line in lines:
            if line is None:
                left_out += 1
                continue
            written += 1
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    if left_out:
        needed = "a prompt and another answer" if request.as_ == "pairs" else "a prompt"
        out.warn(f"{left_out} demonstrations are left out, since the log holds no {needed} for them")
    data = {"experiment": name, "file": str(request.out), "written": written, "left_out": left_out}
    out.result(data, lambda: out.line(f"wrote {written} lines to {request.out}"))
