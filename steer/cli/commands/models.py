"""`steer models`: which models there are, and where."""

from __future__ import annotations

from typing import Any

import click

from steer.cli import options, output


@click.group()
def command() -> None:
    """List models, find their folders, show what they are."""


@command.command("ls", cls=click.Command)
@options.as_json
def ls(as_json: bool) -> None:
    """The bundled model and the hub models in the cache."""
    from vectors import bundled, references

    ready = bundled.folder().is_dir()
    rows: list[dict[str, Any]] = [{"model": references.DEFAULT, "path": str(bundled.folder()), "ready": ready}]
    for source in references.cached():
        rows.append({"model": f"{source.name}@{source.revision}", "path": str(source.path), "ready": True})
    if as_json:
        output.print_json({"models": rows})
        return
    cells = [[row["model"], "ready" if row["ready"] else "prepared on first use", row["path"]] for row in rows]
    click.echo(output.table(["model", "state", "path"], cells, left=3))


@command.command("path")
@click.argument("model")
def path(model: str) -> None:
    """Print the folder of a model; prepares or fetches it when it is not there."""
    from vectors import references

    output.say_preparing(model)
    click.echo(references.resolve(model).path)


@command.command("show")
@click.argument("model")
@options.as_json
def show(model: str, as_json: bool) -> None:
    """What a model is: architecture, sizes, digest, licence."""
    from vectors import references

    output.say_preparing(model)
    source = references.resolve(model)
    facts = {"model": model, "path": str(source.path), **references.identity(source)}
    licence = references.licence(source)
    if licence:
        facts["licence"] = licence
    if as_json:
        output.print_json(facts)
        return
    click.echo("\n".join(f"{key.replace('_', ' '):13} {value}" for key, value in facts.items()))
