"""`steer ab init`: write a commented experiment file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


def _arms(texts: tuple[str, ...]) -> dict[str, str]:
    """The arms of NAME=EXPRESSION, where an empty expression is the control. Raises UsageError."""
    arms: dict[str, str] = {}
    problems = []
    for text in texts:
        name, equals, expression = text.partition("=")
        if not name or not equals:
            problems.append(f"--arm {text!r} is not NAME=EXPRESSION")
        elif name in arms:
            problems.append(f"--arm {name} is given twice")
        else:
            arms[name] = expression.strip()
    if problems:
        raise UsageError(problems, "write --arm control= --arm friendly='1.2*warm'")
    return arms


@dataclass(frozen=True, kw_only=True)
class Request(options.Force):
    """The arguments and options of `steer ab init`."""

    file: Path = option(help="The file to write, such as tone.yaml.", argument=True)
    arms: Mapping[str, str] = option(
        {}, help="An arm and its expression; without one, it is the control.", flag="--arm",
        metavar="NAME=EXPRESSION", parse=_arms,
    )  # fmt: skip
    loras: Mapping[str, str] = option({}, help="An arm with a LoRA adapter.", flag="--lora", metavar="NAME=FOLDER")
    systems: Mapping[str, str] = option({}, help="An arm with a system prompt.", flag="--system", metavar="NAME=TEXT")
    metric: str = option("thumbs", help="The metric that decides, as clients send it to /v1/feedback.")
    adaptive: bool = option(
        False, help="Adapt the weights until the best arm is known (track-and-stop): selection, not estimation."
    )
    model: str = option("", help="The model that is to be served: " + options.A_MODEL, complete="models")


def _commit(text: str, folder: Path) -> str:
    """The commit of the version of the store that an arm's expression is; empty where it is none."""
    from steer.experiments.arms import commit_of

    return commit_of(text, folder, {}) if text else ""


@options.command(
    "init",
    summary="Write a commented experiment file to edit.",
    examples="""
    steer ab init tone.yaml --arm control= --arm friendly='1.2*warm' --metric thumbs
    steer ab init tone.yaml --arm control= --arm now=tone@champion --arm next=tone
    steer ab init tone.yaml --arm control= --arm warm=warm --arm calm=calm --adaptive
    steer ab init tone.yaml --arm control= --arm warm=warm --system prompt='You are warm.' --metric response_tokens
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Write a commented experiment file to edit."""
    from steer.experiments import template
    from vectors.storage.files import write_atomically

    request = requests.build(Request, values)
    output.require_absent(request.file, request.force)
    arms = request.arms or {"control": ""}
    pinned = {name: digest for name, text in arms.items() if (digest := _commit(text, request.file.parent))}
    draft = template.Draft(
        name=request.file.stem, file=str(request.file),
        arms={name: f"'{pinned[name]}'" if name in pinned else text for name, text in arms.items()},
        versions={name: arms[name] for name in pinned}, loras=request.loras, systems=request.systems,
        metric=request.metric, model=request.model, adaptive=request.adaptive,
    )  # fmt: skip
    write_atomically(request.file, template.written(draft).encode())
    out.result({"file": str(request.file), "name": draft.name}, lambda: out.line(f"wrote {request.file}"))
    out.say(f"next: edit it, then steer ab check {request.file}")
