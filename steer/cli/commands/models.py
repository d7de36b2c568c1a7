"""`steer models`: list models, find their folders, show their properties."""

from __future__ import annotations

from typing import Any

import click

from steer.cli import completion, options, output
from steer.cli.output import out


@click.group()
def command() -> None:
    """List models, find their folders, show their properties."""


@options.subcommand(command, "ls", "List the bundled model and the hub models in the cache.")
def ls() -> None:
    """List the bundled model and the hub models in the cache."""
    from vectors import references
    from vectors.storage import bundled

    ready = bundled.folder().is_dir()
    rows: list[dict[str, Any]] = [{"model": references.DEFAULT, "path": str(bundled.folder()), "ready": ready}]
    for source in references.cached():
        rows.append({"model": f"{source.name}@{source.revision}", "path": str(source.path), "ready": True})
    cells = [[row["model"], "ready" if row["ready"] else "prepared on first use", row["path"]] for row in rows]
    out.result({"models": rows}, lambda: out.table(["model", "state", "path"], cells, left=3))


@options.subcommand(command, "path", "Print the folder of a model, which is downloaded if it is missing.")
@click.argument("model", help=options.MODEL, shell_complete=completion.models)
def path(model: str) -> None:
    """Print the folder of a model; a missing model is prepared or downloaded."""
    from vectors import references

    output.say_preparing(model)
    folder = str(references.resolve(model).path)
    out.result({"model": model, "path": folder}, lambda: out.line(folder))


@options.subcommand(command, "show", "Show a model's architecture, sizes, digest and licence.")
@click.argument("model", help=options.MODEL, shell_complete=completion.models)
def show(model: str) -> None:
    """Show a model's architecture, sizes, digest and licence."""
    from vectors import references

    output.say_preparing(model)
    source = references.resolve(model)
    facts = {"model": model, "path": str(source.path), **references.identity(source)}
    licence = references.licence(source)
    if licence:
        facts["licence"] = licence
    lines = [f"{key.replace('_', ' '):13} {value}" for key, value in facts.items()]
    out.result(facts, lambda: out.line("\n".join(lines)))
