"""`steer add`: add a vector to personality.yaml, or change how a part acts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer add`."""

    file: Path = option(
        help="A vector's file, or the folder of a model or an adapter.", argument=True, complete="vectors"
    )
    name: str | None = option(None, help="The name of the part.", default_text="that of the file")
    strength: float | None = option(None, help="The strength.", default_text="the recommended strength")
    layers: str | None = option(None, help="The layers at which it acts.", default_text="those of the vector")
    scope: str | None = option(None, help="The tokens it acts on: prompt, response, first:N or after:N.")
    operation: str | None = option(None, help="add, ablate or clamp.", default_text="add")


@options.command(
    summary="Add a vector, a model or an adapter to personality.yaml.",
    examples="""
    steer add warm.safetensors --strength 1.2
    steer add vectors/refusal.safetensors --operation ablate --scope response
    steer add poet-lora/ --strength 0.5
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Add a part to personality.yaml, with its comments and order left as they are, and store its content.

    FILE is a steering vector, a task vector, or a folder: of a PEFT adapter, or of a model (fine-tuned, baked, merged).
    A folder is stored as a task vector: its exact difference from the base, so that the folder isn't needed again.
    """
    request = requests.build(Request, values)
    from steer.store import layout
    from steer.store.working import folder

    store = layout.require()
    fields = {key: getattr(request, key) for key in ("strength", "layers", "scope", "operation")}
    fields = {key: value for key, value in fields.items() if value is not None}
    with out.progress() as on_event:
        name, new = folder.add(store, request.file, request.name, fields, on_event=on_event)
    described = ", ".join(f"{key} {value}" for key, value in fields.items())
    sentence = f"{'added' if new else 'changed'} {name}" + (f": {described}" if described else "")
    out.result({"part": name, "new": new, **fields}, lambda: out.line(sentence))
