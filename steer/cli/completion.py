"""Shell completion of models, vectors, and names that a registry lists. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vectors.registry import plugins
from vectors.registry.options import Flag

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def completer(flag: Flag) -> Completer | None:
    """The completer for the values of an option; None: click completes them by the option's type."""
    if flag.complete:
        return KINDS[flag.complete]
    if flag.choices or flag.names:
        names = flag.names or (lambda: flag.choices)
        return lambda _context, _parameter, text: _starting(names(), text)
    return None


def models(_context: click.Context, _parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """The bundled model, the hub models in the cache, and folders (which the shell itself completes)."""
    from vectors import references

    if text.startswith((".", "/", "~")):
        return [_item(text, "dir")]
    here = [entry.name for entry in os.scandir() if entry.is_dir() and os.path.isfile(Path(entry, "config.json"))]
    cached = [str(source.name) for source in references.cached()]
    return _starting([references.DEFAULT, *sorted(here), *dict.fromkeys(cached)], text)


def vectors(_context: click.Context, _parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """The .safetensors files of the current folder, also after NAME= of a binding; a path is completed by the shell."""
    bound, equals, value = text.rpartition("=")
    if "/" in value or value.startswith("~"):
        return [_item(text, "file")]
    here = sorted(entry.name for entry in os.scandir() if entry.name.endswith(".safetensors") and entry.is_file())
    return _starting([f"{bound}{equals}{name}" for name in here], text)


def inputs(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """What can be merged: vectors and models."""
    return [*vectors(context, parameter, text), *models(context, parameter, text)]


def formats(_context: click.Context, _parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """The formats of steering vectors."""
    return _starting(plugins.names("vectors.formats", "steer.vector_formats"), text)


KINDS: dict[str, Completer] = {"models": models, "vectors": vectors, "inputs": inputs}


def _starting(names: Iterable[Any], text: str) -> list[CompletionItem]:
    return [_item(name) for name in names if name.startswith(text)]


def _item(text: str, kind: str = "plain") -> CompletionItem:
    from click.shell_completion import CompletionItem

    return CompletionItem(text, type=kind)
